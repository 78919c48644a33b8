package house

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// files are the standard library's ways to a file or a program. What asks for
// the process itself (Getpid, Getenv, Executable) is none.
var files = regexp.MustCompile(`^(os\.(Chdir|Chmod|Chown|Chtimes|CopyFS|Create|CreateTemp|DirFS|Lchown|Link|Lstat|Mkdir|MkdirAll|MkdirTemp|` +
	`Open|OpenFile|OpenInRoot|OpenRoot|Pipe|ReadDir|ReadFile|Readlink|Remove|RemoveAll|Rename|Stat|StartProcess|Symlink|Truncate|WriteFile)|` +
	`exec\..*|filepath\.(EvalSymlinks|Glob|Walk|WalkDir)|ioutil\..*|` +
	`(unix|syscall)\.(.*xattr|Chmod|Chown|Exec|Fchmod.*|ForkExec|Ftruncate|Link.*|Lstat|Mkdir.*|Mknod.*|Mount|Open.*|Rename.*|Rmdir|Stat.*|StartProcess|Symlink.*|Truncate|Unlink.*|Unmount))$`)

// past says which packages look at files past the seam, and at which: the
// kernel's own, which tell its state, and change nothing.
var past = map[string]string{
	"agent/hostnet/conntrack.go": "os.ReadFile os.Stat",         // /proc/sys/net/netfilter, /sys/module
	"agent/hostnet/ipv6.go":      "os.Stat",                     // /proc/net, /proc/sys/net/ipv6
	"agent/hostnet/sockets.go":   "os.ReadFile",                 // /proc/net
	"agent/session/process.go":   "os.Open os.Readlink os.Stat", // /proc/PID
	"agent/session/surprises.go": "os.ReadFile",                 // /sys/class/dmi
	"agent/system/boot.go":       "os.ReadFile",                 // /proc/sys/kernel/random/boot_id
	"agent/system/console.go":    "os.OpenFile os.ReadFile",     // /dev, to say a line there, and /sys/class/tty
	"agent/system/network.go":    "os.Open os.Stat unix.Exec",   // /proc/PID/ns, and then this program again
}

// TestSeam holds that every operation on a file, and every run of a program,
// goes through agent/system, where a test can break it; and there through a
// Step. What a library does is a step as a whole: kardianos/service has no seam.
func TestSeam(t *testing.T) {
	top := filepath.Join("..", "..")
	looked := 0
	for _, dir := range []string{"agent", "bootstrap", "cmd", "profiles"} {
		err := filepath.WalkDir(filepath.Join(top, dir), func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
				return err
			}
			name, err := filepath.Rel(top, path)
			if err != nil {
				return err
			}
			looked++
			set := token.NewFileSet()
			file, err := parser.ParseFile(set, path, nil, 0)
			if err != nil {
				return err
			}
			for _, use := range fileUses(file) {
				allowed := strings.Fields(past[name])
				switch {
				case strings.HasPrefix(name, "agent/system/") && use.stepped:
				case contains(allowed, use.what):
				default:
					t.Errorf("%v: %s: let agent/system do that, in a step", set.Position(use.at), use.what)
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if looked < 60 {
		t.Errorf("only %d files were looked at", looked)
	}
}

func contains(list []string, want string) bool {
	for _, s := range list {
		if s == want {
			return true
		}
	}
	return false
}

type use struct {
	what    string
	at      token.Pos
	stepped bool
}

// unstepped are what agent/system does beside its steps: it cleans up after a
// step that failed, and looks at what a step has just made.
var unstepped = map[string]string{
	"WriteFile": "os.Remove",
	"Symlink":   "os.Remove",
	"tryLock":   "os.Lstat",
	"Populated": "os.ReadFile",         // /sys/fs/cgroup
	"Run":       "exec.CommandContext", // it is run in a step
}

// inSteps are functions that are called in a step alone.
var inSteps = []string{"sayOn", "copyLabel", "lookPath", "trusted", "trustedDir"}

// fileUses lists what of files is used in a source file; stepped is what is
// within the arguments of Do or look.
func fileUses(file *ast.File) []use {
	var all []use
	for _, decl := range file.Decls {
		fn, ok := decl.(*ast.FuncDecl)
		if !ok {
			continue
		}
		covered := contains(inSteps, fn.Name.Name)
		var stack []ast.Node
		ast.Inspect(fn, func(n ast.Node) bool {
			if n == nil {
				stack = stack[:len(stack)-1]
				return true
			}
			stack = append(stack, n)
			sel, ok := n.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			pkg, ok := sel.X.(*ast.Ident)
			if !ok || pkg.Obj != nil || !files.MatchString(pkg.Name+"."+sel.Sel.Name) {
				return true
			}
			u := use{pkg.Name + "." + sel.Sel.Name, sel.Pos(), covered}
			if strings.HasSuffix(u.what, "Error") || u.what == "unix.Stat_t" || u.what == "syscall.Stat_t" {
				return true // a type
			}
			for _, above := range stack {
				if call, ok := above.(*ast.CallExpr); ok && isStep(call.Fun) {
					u.stepped = true
				}
			}
			if fn.Recv != nil || fn.Name.Name == "Populated" {
				u.stepped = u.stepped || contains(strings.Fields(unstepped[fn.Name.Name]), u.what)
			}
			all = append(all, u)
			return true
		})
	}
	return all
}

func isStep(fun ast.Expr) bool {
	switch f := fun.(type) {
	case *ast.Ident:
		return f.Name == "look"
	case *ast.SelectorExpr:
		return f.Sel.Name == "Do"
	}
	return false
}
