package house

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const (
	maxFunction = 80    // lines of a function, from func to its closing brace
	maxMethods  = 25    // exported methods of a type
	maxAgent    = 1000  // lines of the directory agent/ itself
	maxProgram  = 29950 // lines of the program without what computes exposure
	maxExposure = 6900  // lines of that: the model, its readers and its commands
)

// Today's violations, and by how much. The lists only shrink: remove what has come below
// its limit, and add nothing.
var (
	longFunctions   = map[string]int{}
	manyMethods     = map[string]int{}
	longDirectories = map[string]int{}
	longPrograms    = map[string]int{}
)

// ofExposure matches the files that compute what the rules of all programs do.
var ofExposure = regexp.MustCompile(`(^|/)(exposure|explain)(\.go|/)|^agent/(iptables|nftables)/live`)

func TestSizes(t *testing.T) {
	functions, methods, program, exposure := map[string]int{}, map[string]int{}, map[string]int{}, map[string]int{}
	directory := map[string]int{}
	programFiles(t, func(name string, set *token.FileSet, file *ast.File) {
		dir, lines := path.Dir(name), set.File(file.FileStart).LineCount()
		if ofExposure.MatchString(name) {
			exposure["lines of exposure"] += lines
		} else {
			program["lines of the program"] += lines
		}
		if dir == "agent" {
			directory["lines of agent"] += lines
		}
		for _, decl := range file.Decls {
			fn, ok := decl.(*ast.FuncDecl)
			if !ok {
				continue
			}
			called := dir + " " + fn.Name.Name
			if fn.Recv != nil {
				on := dir + " " + receiver(fn.Recv.List[0].Type)
				called = on + "." + fn.Name.Name
				if fn.Name.IsExported() {
					methods[on]++
				}
			}
			functions[called] = max(functions[called], set.Position(fn.End()).Line-set.Position(fn.Pos()).Line+1)
		}
	})
	ratchet(t, maxFunction, functions, longFunctions)
	ratchet(t, maxMethods, methods, manyMethods)
	ratchet(t, maxAgent, directory, longDirectories)
	ratchet(t, maxProgram, program, longPrograms)
	ratchet(t, maxExposure, exposure, longPrograms)
}

// ratchet checks that only known violations exceed a limit, that these do not grow, and
// that all of them still exceed it.
func ratchet(t *testing.T, limit int, got, known map[string]int) {
	t.Helper()
	for _, name := range slices.Sorted(maps.Keys(got)) {
		if n := got[name]; n > max(limit, known[name]) {
			t.Errorf("%s: %d, want at most %d", name, n, max(limit, known[name]))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(known)) {
		if got[name] <= limit {
			t.Errorf("%s: %d is within the limit of %d: remove it from the list", name, got[name], limit)
		}
	}
}

func receiver(typ ast.Expr) string {
	switch t := typ.(type) {
	case *ast.StarExpr:
		return receiver(t.X)
	case *ast.IndexExpr:
		return receiver(t.X)
	case *ast.IndexListExpr:
		return receiver(t.X)
	case *ast.Ident:
		return t.Name
	}
	return ""
}

// programFiles calls do for every source file of the program, with its path from the top.
func programFiles(t *testing.T, do func(name string, set *token.FileSet, file *ast.File)) {
	t.Helper()
	top := filepath.Join("..", "..")
	for _, dir := range []string{"agent", "bootstrap", "cmd", "profiles", "packaging", "docs"} {
		err := filepath.WalkDir(filepath.Join(top, dir), func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
				return err
			}
			name, err := filepath.Rel(top, path)
			if err != nil {
				return err
			}
			set := token.NewFileSet()
			file, err := parser.ParseFile(set, path, nil, 0)
			if err != nil {
				return err
			}
			do(name, set, file)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}
