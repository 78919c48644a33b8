// Package kernel_test runs the built program on a real kernel and looks at the
// outcome from outside: what an outsider reaches, what iptables-save prints,
// what the files hold. It knows nothing of the program's inside.
package kernel_test

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// program is the binary under test, built once.
var program string

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(func() int {
		// Most of a test's time goes by waiting for packets that do not come.
		if err := flag.Set("test.parallel", "4"); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		dir, err := os.MkdirTemp("", "basicfw-kernel-")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		// Others may run it too: one test is somebody who is not root.
		if err := os.Chmod(dir, 0o755); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		program = filepath.Join(dir, "basicfw-agent")
		build := exec.Command("go", "build", "-o", program, "github.com/basicfw/basicfw-agent/cmd/basicfw-agent")
		if out, err := build.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "building basicfw-agent: %v\n%s", err, out)
			return 1
		}
		return m.Run()
	}())
}

// families are the two, in the names that the program gives them.
const (
	ipv4 = "ipv4"
	ipv6 = "ipv6"
)

func families() []string { return []string{ipv4, ipv6} }

// machine is a server in a lab, with a file tree of its own, on which the
// program runs.
type machine struct {
	*lab.Lab
	root string // what --root is given
	bin  string // what /usr/local/sbin is: it decides which iptables runs
	// multi is the iptables program: xtables-nft-multi or xtables-legacy-multi.
	multi string
	// netlink is set where iptables does not work, and the rules are in nf_tables.
	netlink bool
	// noIPv6 has the program see a kernel without IPv6.
	noIPv6 bool
}

// exit codes of the contract.
const (
	exitOK = iota
	exitFailed
	exitUsage
	exitDrift
	exitNotBootstrapped
)

// variants are the ways to have the kernel filter: the two of iptables, and
// nf_tables over netlink, where iptables does not work.
var variants = []string{"nft", "legacy", "netlink"}

// onEach runs a test on a new machine with each variant. They run beside each
// other, and beside other tests.
func onEach(t *testing.T, test func(t *testing.T, m *machine)) { on(t, variants, test) }

// onBoth is onEach for what iptables alone has.
func onBoth(t *testing.T, test func(t *testing.T, m *machine)) { on(t, variants[:2], test) }

func on(t *testing.T, variants []string, test func(t *testing.T, m *machine)) {
	t.Parallel()
	for _, variant := range variants {
		t.Run(variant, func(t *testing.T) {
			t.Parallel()
			test(t, newMachine(t, variant))
		})
	}
}

func newMachine(t *testing.T, variant string) *machine {
	t.Helper()
	m := &machine{multi: "xtables-" + variant + "-multi", netlink: variant == "netlink"}
	if m.netlink {
		m.multi = "xtables-nft-multi"
	}
	lab.Need(t, m.multi, "ip", "nft")
	m.Lab, m.root, m.bin = lab.New(t), t.TempDir(), t.TempDir()
	for _, name := range strings.Fields(iptablesPrograms) {
		if m.netlink {
			m.broken(t, name)
		} else {
			m.link(t, name)
		}
	}
	for _, dir := range []string{"etc/sysconfig", "etc/basicfw/profiles.d", "var/lib", "run", "usr"} {
		if err := os.MkdirAll(filepath.Join(m.root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	// Others than root may look at them: their parent is the test's own.
	for _, dir := range []string{filepath.Dir(m.root), m.root, m.bin} {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	// The xtables lock is below /run. Its own keeps machines apart.
	m.Host.Bind(t, filepath.Join(m.root, "run"), "/run")
	m.Host.Bind(t, m.bin, "/usr/local/sbin")
	return m
}

const iptablesPrograms = "iptables iptables-save iptables-restore ip6tables ip6tables-save ip6tables-restore"

// link has a name be the machine's iptables program.
func (m *machine) link(t *testing.T, name string) {
	t.Helper()
	path, err := exec.LookPath(m.multi)
	if err == nil {
		err = os.Symlink(path, filepath.Join(m.bin, name))
	}
	if err != nil {
		t.Fatal(err)
	}
}

// broken has a name be a program that fails, as iptables does where the kernel's
// modules for it are missing.
func (m *machine) broken(t *testing.T, name string) {
	t.Helper()
	const script = "#!/bin/sh\necho 'Extension tcp revision 0 not supported, missing kernel module?' >&2\nexit 1\n"
	if err := os.WriteFile(filepath.Join(m.bin, name), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
}

// insist has the machine's owner want iptables, whether it works or not.
func (m *machine) insist(t *testing.T) {
	t.Helper()
	m.write(t, "/etc/basicfw/agent.ini", "[agent]\nbackend = iptables\n", 0o640)
}

// command is a run of the program. It is given nothing of who runs the test.
func (m *machine) command(args ...string) lab.Command {
	return lab.Command{
		Args:   append([]string{program, "--root", m.root}, args...),
		Env:    []string{"PATH=/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "TERM=dumb"},
		Dir:    "/",
		NoIPv6: m.noIPv6,
	}
}

// start starts the program on the machine.
func (m *machine) start(t *testing.T, args ...string) *lab.Process {
	t.Helper()
	return m.Host.Start(t, m.command(args...))
}

// agent runs the program on the machine.
func (m *machine) agent(t *testing.T, args ...string) lab.Result {
	t.Helper()
	return m.start(t, args...).Wait(t)
}

// must runs the program, which has to end with a certain exit code.
func (m *machine) must(t *testing.T, code int, args ...string) lab.Result {
	t.Helper()
	r := m.agent(t, args...)
	if r.Code != code {
		t.Fatalf("basicfw-agent %s: exit code %d, want %d\nstdout: %s\nstderr: %s",
			strings.Join(args, " "), r.Code, code, r.Stdout, r.Stderr)
	}
	return r
}

// bootstrap closes the machine for all but the client.
func (m *machine) bootstrap(t *testing.T) lab.Result {
	t.Helper()
	return m.must(t, exitOK, "bootstrap", "--profile", "web+mail", "--client-ip", m.Client.String(), "--no-service", "--no-selftest")
}

// write writes a file below the root.
func (m *machine) write(t *testing.T, path, text string, mode os.FileMode) {
	t.Helper()
	path = filepath.Join(m.root, path)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

// read reads a file below the root.
func (m *machine) read(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(m.root, path))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// rulesFile is where the rules of a family are kept over a boot.
func rulesFile(family string) string {
	return "/etc/sysconfig/" + tables(family)
}

// tables is iptables or ip6tables.
func tables(family string) string {
	if family == ipv4 {
		return "iptables"
	}
	return "ip6tables"
}

// iptables runs iptables or ip6tables, as somebody with a shell would.
func (m *machine) iptables(t *testing.T, family string, args ...string) {
	t.Helper()
	m.Host.MustRun(t, append([]string{m.multi, tables(family)}, args...)...)
}

// load loads a text with iptables-restore or ip6tables-restore.
func (m *machine) load(t *testing.T, family, text string, args ...string) {
	t.Helper()
	r := m.Host.Run(t, lab.Command{
		Args:  append([]string{m.multi, tables(family) + "-restore"}, args...),
		Stdin: text,
	})
	if r.Code != 0 {
		t.Fatalf("%s-restore: %s\n%s", tables(family), r.Stderr, text)
	}
}

// filter is what iptables-save prints of the filter table, ready to be changed
// and loaded again.
func (m *machine) filter(t *testing.T, family string) []string {
	t.Helper()
	return clean(m.Host.MustRun(t, m.multi, tables(family)+"-save", "-t", "filter"))
}

// clean leaves out of what iptables-save prints what differs between two
// looks at the same rules: comments and counters.
func clean(text string) []string {
	var lines []string
	for _, l := range strings.Split(text, "\n") {
		if l == "" || strings.HasPrefix(l, "#") {
			continue
		}
		if strings.HasPrefix(l, ":") {
			l = l[:strings.LastIndex(l, " [")]
		}
		lines = append(lines, l)
	}
	return lines
}

// rules is all that iptables-save prints in both families, in a form in which
// two looks can be compared. A table without a rule, a chain of somebody's or
// a policy other than ACCEPT counts as none.
func (m *machine) rules(t *testing.T) string {
	t.Helper()
	var all []string
	for _, family := range families() {
		var found []string
		var table []string
		empty := true
		for _, l := range clean(m.Host.MustRun(t, m.multi, tables(family)+"-save")) {
			table = append(table, l)
			switch {
			case strings.HasPrefix(l, "*"):
				table, empty = []string{l}, true
			case l == "COMMIT":
				if !empty {
					found = append(found, strings.Join(table, "\n"))
				}
			case !strings.HasPrefix(l, ":") || !strings.HasSuffix(l, " ACCEPT"):
				empty = false
			}
		}
		slices.Sort(found) // tables come in the order of their first use
		all = append(all, family+":\n"+strings.Join(found, "\n"))
	}
	return strings.Join(append(all, m.table(t)), "\n")
}

// table is our table of nf_tables, without counters and what packets put into
// sets; "" is none.
func (m *machine) table(t *testing.T) string {
	t.Helper()
	r := m.Host.Run(t, lab.Command{Args: []string{"nft", "-s", "list", "table", "inet", "basicfw"}})
	if r.Code != 0 {
		return ""
	}
	sets := regexp.MustCompile(`(flags dynamic,timeout\n\t\ttimeout \w+\n)\t\telements = \{[^}]*\}\n`)
	return sets.ReplaceAllString(r.Stdout, "$1")
}

// tree describes every file below a directory of the root: type, mode, and
// content. With identity, also what tells a file that was written again.
func (m *machine) tree(t *testing.T, identity bool, dirs ...string) string {
	t.Helper()
	var b strings.Builder
	for _, dir := range dirs {
		err := filepath.WalkDir(filepath.Join(m.root, dir), func(path string, d os.DirEntry, err error) error {
			if err != nil {
				return err
			}
			fi, err := os.Lstat(path)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, "%s %v", strings.TrimPrefix(path, m.root), fi.Mode())
			if fi.Mode().IsRegular() {
				data, err := os.ReadFile(path)
				if err != nil {
					return err
				}
				fmt.Fprintf(&b, " %q", data)
				if identity {
					fmt.Fprintf(&b, " inode %d, of %v", fi.Sys().(*syscall.Stat_t).Ino, fi.ModTime())
				}
			}
			b.WriteByte('\n')
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return b.String()
}

// everything is what must not change where nothing may: rules and files.
func (m *machine) everything(t *testing.T) string {
	t.Helper()
	return m.rules(t) + "\n" + m.tree(t, false, "etc", "var")
}

// same fails where two texts differ, and shows the lines that do.
func same(t *testing.T, what, want, got string) {
	t.Helper()
	if want != got {
		t.Errorf("%s:%s", what, difference(want, got))
	}
}

// difference lists the lines that one text has and the other has not.
func difference(want, got string) string {
	w, g := strings.Split(want, "\n"), strings.Split(got, "\n")
	var b strings.Builder
	for _, l := range w {
		if !slices.Contains(g, l) {
			fmt.Fprintf(&b, "\n- %.400s", l)
		}
	}
	for _, l := range g {
		if !slices.Contains(w, l) {
			fmt.Fprintf(&b, "\n+ %.400s", l)
		}
	}
	if b.Len() == 0 {
		return fmt.Sprintf(" same lines in another order:\n%s\n-----\n%s", want, got)
	}
	return b.String()
}

// oneLine fails where an error is not one line that says certain words.
func oneLine(t *testing.T, stderr string, words ...string) {
	t.Helper()
	if strings.Count(stderr, "\n") != 1 || !strings.HasSuffix(stderr, "\n") {
		t.Errorf("want one line on stderr, got %q", stderr)
	}
	says(t, stderr, words...)
}

// says fails where a text lacks one of the words.
func says(t *testing.T, text string, words ...string) {
	t.Helper()
	for _, w := range words {
		if !strings.Contains(strings.ToLower(text), strings.ToLower(w)) {
			t.Errorf("want %q in:\n%s", w, text)
		}
	}
}
