// Package kernel_test runs the built program on a real kernel and checks the result from
// outside: what a client reaches, what iptables-save prints, what the files hold. It uses
// no package of the program.
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
	"time"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// program is the binary under test, built once.
var program string

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(func() int {
		// Most of a test's time is spent waiting for packets that do not arrive.
		skip := strings.Trim(flag.Lookup("test.skip").Value.String()+"|"+skipped(), "|")
		for name, value := range map[string]string{"test.parallel": "6", "test.skip": skip} {
			if err := flag.Set(name, value); err != nil {
				fmt.Fprintln(os.Stderr, err)
				return 1
			}
		}
		dir, err := os.MkdirTemp("", "basicfw-kernel-")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		// One test runs it as an unprivileged user.
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

// The address families as the program names them.
const (
	ipv4 = "ipv4"
	ipv6 = "ipv6"
)

func families() []string { return []string{ipv4, ipv6} }

// machine is a server in a lab with its own file tree, on which the program runs.
type machine struct {
	*lab.Lab
	root string // the argument of --root
	bin  string // mounted at /usr/local/sbin: it decides which iptables runs
	// multi is the iptables program: xtables-nft-multi or xtables-legacy-multi.
	multi string
	// netlink is set if iptables does not work, and the rules are in nf_tables.
	netlink bool
	// noIPv6 hides IPv6 from the program.
	noIPv6 bool
	// noNamespaces denies the program a network namespace of its own.
	noNamespaces bool
	// linux2632 hides newer system calls from the program.
	linux2632 bool
	// path, if set, is the PATH of the program.
	path string
}

// The exit codes of the contract.
const (
	exitOK = iota
	exitFailed
	exitUsage
	exitDrift
	exitNotBootstrapped
)

// variants are the ways to filter packets: the two of iptables, and nf_tables over netlink,
// on a machine whose iptables does not work.
var variants = []string{"nft", "legacy", "netlink"}

// onEach runs a test on a new machine for each variant, in parallel with each other and
// with other tests.
func onEach(t *testing.T, test func(t *testing.T, m *machine)) { on(t, variants, test) }

// onBoth is onEach for iptables only.
func onBoth(t *testing.T, test func(t *testing.T, m *machine)) { on(t, variants[:2], test) }

func on(t *testing.T, variants []string, test func(t *testing.T, m *machine)) {
	t.Parallel()
	for _, variant := range ofPart(t, variants) {
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
	// The watcher of a pending change outlives its command, and writes below the root.
	t.Cleanup(func() { m.Host.KillAll(t) })
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
	// Unprivileged users may read them: their parent belongs to the test alone.
	for _, dir := range []string{filepath.Dir(m.root), m.root, m.bin} {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	// The xtables lock is below /run: a /run of its own keeps machines apart.
	m.Host.Bind(t, filepath.Join(m.root, "run"), "/run")
	m.Host.Bind(t, m.bin, "/usr/local/sbin")
	return m
}

const iptablesPrograms = "iptables iptables-save iptables-restore ip6tables ip6tables-save ip6tables-restore"

// variant returns the machine's variant.
func (m *machine) variant() string {
	if m.netlink {
		return "netlink"
	}
	return strings.Split(m.multi, "-")[1]
}

// loadKept loads the persisted files of a machine, its own or another's, as a boot without
// the agent does.
func (m *machine) loadKept(t *testing.T, of *machine) {
	t.Helper()
	if m.netlink {
		m.Host.MustRun(t, "nft", "-f", filepath.Join(of.root, tableFile))
		return
	}
	for _, family := range families() {
		m.load(t, family, of.read(t, rulesFile(family)))
	}
}

// link makes a name point to the machine's iptables program.
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

// broken replaces a program by one that fails, as iptables does if its kernel modules are
// missing.
func (m *machine) broken(t *testing.T, name string) {
	t.Helper()
	const script = "#!/bin/sh\necho 'Extension tcp revision 0 not supported, missing kernel module?' >&2\nexit 1\n"
	if err := os.WriteFile(filepath.Join(m.bin, name), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
}

// insist sets `backend = iptables`, whether iptables works or not.
func (m *machine) insist(t *testing.T) {
	t.Helper()
	m.write(t, "/etc/basicfw/agent.ini", "[agent]\nbackend = iptables\n", 0o640)
}

// command returns a run of the program, without the environment of the test.
func (m *machine) command(args ...string) lab.Command {
	path := m.path
	if path == "" {
		path = "/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
	}
	return lab.Command{
		Args:         append([]string{program, "--root", m.root}, args...),
		Env:          []string{"PATH=" + path, "HOME=/root", "TERM=dumb"},
		Dir:          "/",
		NoIPv6:       m.noIPv6,
		NoNamespaces: m.noNamespaces,
		Linux2632:    m.linux2632,
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

// must runs the program, which has to exit with the given code.
func (m *machine) must(t *testing.T, code int, args ...string) lab.Result {
	t.Helper()
	r := m.agent(t, args...)
	if r.Code != code {
		t.Fatalf("basicfw-agent %s: exit code %d, want %d\nstdout: %s\nstderr: %s",
			strings.Join(args, " "), r.Code, code, r.Stdout, r.Stderr)
	}
	return r
}

// bootstrap closes the machine to everyone except the client.
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

// rulesFile returns the persisted file of a family.
func rulesFile(family string) string {
	return "/etc/sysconfig/" + tables(family)
}

// tableFile is the persisted file of nf_tables.
const tableFile = "/etc/nftables/basicfw.nft"

// persisted returns the machine's persisted files.
func (m *machine) persisted() []string {
	if m.netlink {
		return []string{tableFile}
	}
	return []string{rulesFile(ipv4), rulesFile(ipv6)}
}

// keptOf returns the persisted file of a family.
func (m *machine) keptOf(family string) string {
	if m.netlink {
		return tableFile
	}
	return rulesFile(family)
}

// kept returns the contents of the persisted files.
func (m *machine) kept(t *testing.T) string {
	t.Helper()
	var all []string
	for _, path := range m.persisted() {
		all = append(all, m.read(t, path))
	}
	return strings.Join(all, "\n")
}

// keptIn returns the directory of the persisted files.
func (m *machine) keptIn() string { return filepath.Dir(m.persisted()[0]) }

// ours returns the loaded rules of a family, one a line: its filter table, or its chains of
// our table and the chain that both families pass.
func (m *machine) ours(t *testing.T, family string) []string {
	t.Helper()
	if !m.netlink {
		return m.filter(t, family)
	}
	var lines []string
	in := ""
	for _, l := range strings.Split(m.table(t), "\n") {
		if name, ok := strings.CutPrefix(l, "\tchain "); ok {
			in = strings.Fields(name)[0]
		}
		if in == "input" || strings.HasPrefix(in, family+"-") {
			lines = append(lines, strings.TrimSpace(l))
		}
	}
	return lines
}

// comment returns how a rule's name is printed, with its delimiter.
func (m *machine) comment(name string) string {
	if m.netlink {
		return `comment "basicfw-` + name + `"`
	}
	return "--comment basicfw-" + name + " "
}

// from returns how a match on the incoming interface is printed.
func (m *machine) from(device string) string {
	if m.netlink {
		return `iifname "` + device + `" `
	}
	return "-i " + device + " "
}

// hasRule reports whether a rule has all the words.
func (m *machine) hasRule(t *testing.T, words ...string) bool {
	t.Helper()
	for _, line := range strings.Split(m.rules(t), "\n") {
		if !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(line, w) }) {
			return true
		}
	}
	return false
}

// ends returns how a rule's end time is printed. The last second is included.
func (m *machine) ends(end time.Time) string {
	if m.netlink {
		return fmt.Sprintf("meta time < %d ", end.Unix()+1)
	}
	return "--datestop " + end.UTC().Format("2006-01-02T15:04:05") + " "
}

// begins returns how a rule's start time is printed.
func (m *machine) begins(when time.Time) string {
	if m.netlink {
		return fmt.Sprintf("meta time >= %d ", when.Unix())
	}
	return "--datestart " + when.UTC().Format("2006-01-02T15:04:05") + " "
}

// timed counts the rules in a text that have a start or end time.
func (m *machine) timed(text string) int {
	if m.netlink {
		return strings.Count(text, "meta time ")
	}
	return strings.Count(text, "-m time ")
}

// hand is a manual change of a family's rules: arguments of iptables, or commands of nft,
// both separated by "; ". FAMILY stands for ipv4 or ipv6.
type hand struct{ iptables, nft string }

var (
	// byFlush leaves the policy, which drops everything.
	byFlush     = hand{"-F", "flush table inet basicfw"}
	byFlushOurs = hand{"-F BASICFW-INPUT", "flush chain inet basicfw FAMILY-input"}
	// byTakeAway opens everything. It can be done to one family after the other.
	byTakeAway = hand{"-P INPUT ACCEPT; -F; -X", "add table inet basicfw; delete table inet basicfw"}
	byPolicy   = hand{"-P INPUT ACCEPT", "chain inet basicfw input { policy accept; }"}
)

// by changes the rules of families by hand.
func (m *machine) by(t *testing.T, do hand, families ...string) {
	t.Helper()
	for _, family := range families {
		if m.netlink {
			m.nft(t, strings.ReplaceAll(do.nft, "FAMILY", family))
			continue
		}
		for _, args := range strings.Split(do.iptables, "; ") {
			m.iptables(t, family, strings.Fields(args)...)
		}
	}
}

// nft runs commands of nft in one transaction.
func (m *machine) nft(t *testing.T, commands string) {
	t.Helper()
	r := m.Host.Run(t, lab.Command{Args: []string{"nft", "-f", "-"}, Stdin: strings.ReplaceAll(commands, "; ", ";\n") + "\n"})
	if r.Code != 0 {
		t.Fatalf("nft: %s\n%s", r.Stderr, commands)
	}
}

// remove removes the rules with a name from one of our chains, "INPUT" or "SSH".
func (m *machine) remove(t *testing.T, family, chain, name string) {
	t.Helper()
	found := false
	if !m.netlink {
		for _, l := range m.filter(t, family) {
			if strings.HasPrefix(l, "-A BASICFW-"+chain+" ") && strings.Contains(l, m.comment(name)) {
				m.iptables(t, family, append([]string{"-D"}, strings.Fields(l)[1:]...)...)
				found = true
			}
		}
	} else {
		chain := family + "-" + strings.ToLower(chain)
		for _, l := range strings.Split(m.Host.MustRun(t, "nft", "-a", "list", "chain", "inet", "basicfw", chain), "\n") {
			if rule, handle, ok := strings.Cut(l, " # handle "); ok && strings.HasSuffix(rule, m.comment(name)) {
				m.nft(t, "delete rule inet basicfw "+chain+" handle "+handle)
				found = true
			}
		}
	}
	if !found {
		t.Fatalf("no rule %s of %s in %s", name, family, chain)
	}
}

// chain returns the name of one of our chains, "INPUT" or "SSH", with the family if the
// kernel's name has it.
func (m *machine) chain(family, chain string) string {
	if m.netlink {
		return family + "-" + strings.ToLower(chain)
	}
	return "BASICFW-" + chain
}

// tables returns "iptables" or "ip6tables".
func tables(family string) string {
	if family == ipv4 {
		return "iptables"
	}
	return "ip6tables"
}

// iptables runs iptables or ip6tables as an administrator would.
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

// filter returns the filter table as iptables-save prints it, ready to be edited and loaded
// again.
func (m *machine) filter(t *testing.T, family string) []string {
	t.Helper()
	return clean(m.Host.MustRun(t, m.multi, tables(family)+"-save", "-t", "filter"))
}

// clean drops from the output of iptables-save what changes between two calls: comments and
// counters.
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

// rules returns what iptables-save prints for both families, and our table, in a form that
// can be compared. A table is left out if it has no rule, no user-defined chain and no
// policy except ACCEPT.
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
		slices.Sort(found) // tables are printed in the order of their first use
		all = append(all, family+":\n"+strings.Join(found, "\n"))
	}
	return strings.Join(append(all, m.table(t)), "\n")
}

// table returns our table of nf_tables without counters and dynamic set elements, and with
// times in seconds since 1970, as in our file; "" if there is none.
func (m *machine) table(t *testing.T) string {
	t.Helper()
	r := m.Host.Run(t, lab.Command{Args: []string{"nft", "-s", "list", "table", "inet", "basicfw"}, Env: append(os.Environ(), "TZ=UTC")})
	if r.Code != 0 {
		return ""
	}
	sets := regexp.MustCompile(`(flags dynamic,timeout\n\t\ttimeout \w+\n)\t\telements = \{[^}]*\}\n`)
	text := sets.ReplaceAllString(r.Stdout, "$1")
	// Sets and chains are printed in the order of their creation, which means nothing.
	if head, body, ok := strings.Cut(strings.TrimSuffix(text, "}\n"), "\n"); ok {
		parts := strings.Split(strings.TrimSuffix(body, "\n"), "\n\n")
		slices.SortFunc(parts, func(a, b string) int {
			if chain := strings.HasPrefix(a, "\tchain "); chain != strings.HasPrefix(b, "\tchain ") {
				return map[bool]int{true: 1, false: -1}[chain]
			}
			return strings.Compare(a, b)
		})
		text = head + "\n" + strings.Join(parts, "\n\n") + "\n}\n"
	}
	text = strings.ReplaceAll(text, "meta l4proto igmp", "meta l4proto 2") // a name from /etc/protocols
	return dates.ReplaceAllStringFunc(text, func(date string) string {
		when, err := time.Parse(`"2006-01-02 15:04:05"`, date)
		if err != nil {
			t.Fatal(err)
		}
		return fmt.Sprint(when.Unix())
	})
}

var dates = regexp.MustCompile(`"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"`)

// tree describes every file below directories of the root: type, mode and content. With
// identity it also shows whether a file was written again.
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
				if strings.HasSuffix(path, copyFile) && !identity {
					data = nil // not a setting: wantCopy compares it with the state
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

// everything returns what must not change if nothing may: rules and files.
func (m *machine) everything(t *testing.T) string {
	t.Helper()
	return m.rules(t) + "\n" + m.tree(t, false, "etc", "var")
}

// same fails if two texts differ, and prints the lines that do.
func same(t *testing.T, what, want, got string) {
	t.Helper()
	if want != got {
		t.Errorf("%s:%s", what, difference(want, got))
	}
}

// difference lists the lines that only one of two texts has.
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

// oneLine fails unless an error is one line, with or without a hint, and has all the words.
func oneLine(t *testing.T, stderr string, words ...string) {
	t.Helper()
	cause, hint, hinted := strings.Cut(stderr, "\nhint: ")
	if !strings.HasSuffix(stderr, "\n") || strings.Count(cause+hint, "\n") != 1 || hinted && hint == "\n" {
		t.Errorf("want one line on stderr, optionally with a hint, got %q", stderr)
	}
	says(t, stderr, words...)
}

// says fails if a text lacks one of the words.
func says(t *testing.T, text string, words ...string) {
	t.Helper()
	for _, w := range words {
		if !strings.Contains(strings.ToLower(text), strings.ToLower(w)) {
			t.Errorf("want %q in:\n%s", w, text)
		}
	}
}
