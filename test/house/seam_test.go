package house

import (
	"go/ast"
	"go/token"
	"regexp"
	"strings"
	"testing"
)

// files matches the standard library's accesses to files and programs. Functions about the
// process itself (Getpid, Getenv, Executable) are not among them.
var files = regexp.MustCompile(`^(os\.(Chdir|Chmod|Chown|Chtimes|CopyFS|Create|CreateTemp|DirFS|Lchown|Link|Lstat|Mkdir|MkdirAll|MkdirTemp|` +
	`Open|OpenFile|OpenInRoot|OpenRoot|Pipe|ReadDir|ReadFile|Readlink|Remove|RemoveAll|Rename|Stat|StartProcess|Symlink|Truncate|WriteFile)|` +
	`exec\..*|filepath\.(EvalSymlinks|Glob|Walk|WalkDir)|ioutil\..*|` +
	`(unix|syscall)\.(.*xattr|Chmod|Chown|Exec|Fchmod.*|ForkExec|Ftruncate|Link.*|Lstat|Mkdir.*|Mknod.*|Mount|Open.*|Rename.*|Rmdir|Stat.*|StartProcess|Symlink.*|Truncate|Unlink.*|Unmount))$`)

// past lists the source files that read files without the seam, and how: all are only read.
// They are the kernel's own, but for one that a command on any system names.
var past = map[string]string{
	"agent/iptables/backend.go":     "filepath.EvalSymlinks",        // the links of a program
	"agent/host/conntrack.go":       "os.ReadFile os.Stat",          // /proc/sys/net/netfilter, /sys/module
	"agent/host/hazards.go":         "os.ReadFile os.Stat",          // /proc/net, /proc/sys/net, /sys/module
	"agent/host/ipv6.go":            "os.Stat",                      // /proc/net, /proc/sys/net/ipv6
	"agent/host/sockets.go":         "os.ReadFile",                  // /proc/net
	"agent/sshd/process.go":         "os.Open os.Readlink os.Stat",  // /proc/PID
	"agent/sshd/warnings.go":        "os.ReadFile",                  // /sys/class/dmi
	"agent/system/boot.go":          "os.ReadFile",                  // /proc/sys/kernel/random/boot_id
	"agent/system/memory.go":        "os.ReadFile",                  // /proc/self/maps
	"agent/system/chroot.go":        "os.Stat",                      // /, /proc/1
	"agent/system/console.go":       "os.OpenFile os.ReadFile",      // /dev, to write a line, and /sys/class/tty
	"agent/system/supervise.go":     "os.ReadFile syscall.ForkExec", // /proc, /sys/fs/cgroup, and this program
	"cmd/basicfw-agent/userdata.go": "os.ReadFile",                  // --ca-file
	"agent/system/network.go":       "os.Open os.Stat unix.Exec",    // /proc/PID/ns, and then this program again
}

// TestSeam checks that every operation on a file and every run of a program goes through
// agent/system, and there through a Step, which a test can break. A library's work is one
// step as a whole: kardianos/service has no seam.
func TestSeam(t *testing.T) {
	looked := 0
	programFiles(t, func(name string, set *token.FileSet, file *ast.File) {
		looked++
		for _, use := range fileUses(file) {
			allowed := strings.Fields(past[name])
			switch {
			case strings.HasPrefix(name, "agent/system/") && use.stepped:
			case contains(allowed, use.what):
			default:
				t.Errorf("%v: %s: use agent/system, in a step", set.Position(use.at), use.what)
			}
		}
	})
	if looked < 60 {
		t.Errorf("only %d files were checked", looked)
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

// unstepped lists what agent/system does outside of its steps: it cleans up after a failed
// step, and checks what a step has just made.
var unstepped = map[string]string{
	"WriteFile": "os.Remove",
	"Symlink":   "os.Remove",
	"tryLock":   "os.Lstat",
	"Populated": "os.ReadFile",         // /sys/fs/cgroup
	"Run":       "exec.CommandContext", // it is run in a step
}

// inSteps lists the functions that are called only in a step.
var inSteps = []string{"sayOn", "label", "lookPath", "trusted", "trustedDir"}

// fileUses lists the file accesses of a source file; stepped are those within the arguments
// of Do or look.
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
