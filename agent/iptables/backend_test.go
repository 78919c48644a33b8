package iptables

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/basicfw/basicfw-agent/agent/backend"
	"github.com/basicfw/basicfw-agent/agent/exposure"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/hint"
	"github.com/basicfw/basicfw-agent/agent/system"
	"github.com/basicfw/basicfw-agent/test/lab"
)

// versions are the versions before and after each relevant change in iptables.
var versions = []struct {
	name    string
	fake    fake
	backend string
	args    string // of a restore
	query   string // what else is run: "version", or "wait" for a test of --wait
}{
	{"1.4.7", fake{Version: "1.4.7"}, "iptables 1.4.7 (legacy)", "--noflush", ""},
	{"1.4.19.1", fake{Version: "1.4.19.1"}, "iptables 1.4.19.1 (legacy)", "--noflush", ""},
	{"1.4.20", fake{Version: "1.4.20"}, "iptables 1.4.20 (legacy)", "--noflush", "wait"},
	{"1.4.21", fake{Version: "1.4.21"}, "iptables 1.4.21 (legacy)", "--noflush", "wait"},
	{"1.4.21 of EL7", fake{Version: "1.4.21", Waits: true}, "iptables 1.4.21 (legacy)", "--noflush --wait=1", "wait"},
	{"1.6.1", fake{Version: "1.6.1"}, "iptables 1.6.1 (legacy)", "--noflush", "wait"},
	{"1.6.2", fake{Version: "1.6.2", Waits: true}, "iptables 1.6.2 (legacy)", "--noflush --wait=1", ""},
	{"1.8.2 nft", fake{Version: "1.8.2", NFT: true}, "iptables 1.8.2 (nf_tables)", "--noflush", "version"},
	{"1.8.4 legacy", fake{Version: "1.8.4", Waits: true}, "iptables 1.8.4 (legacy)", "--noflush --wait=1", "version"},
	{"1.8.4 nft", fake{Version: "1.8.4", NFT: true}, "iptables 1.8.4 (nf_tables)", "--noflush", "version"},
	{"1.8.7 nft", fake{Version: "1.8.7", NFT: true}, "iptables 1.8.7 (nf_tables)", "--noflush", "version"},
	{"1.8.9 legacy", fake{Version: "1.8.9", Waits: true}, "iptables 1.8.9 (legacy)", "--noflush --wait=1", ""},
	{"1.8.13 nft", fake{Version: "1.8.13", NFT: true}, "iptables 1.8.13 (nf_tables)", "--noflush", ""},
}

// old returns the fake programs of a version.
func old(t *testing.T, name string) fake {
	t.Helper()
	for _, v := range versions {
		if v.name == name {
			return v.fake
		}
	}
	t.Fatalf("no version %q", name)
	return fake{}
}

// ruleset returns rules that the versions print differently.
func ruleset(t *testing.T) firewall.Ruleset {
	t.Helper()
	d := webMail()
	d.SSH.Mode, d.SSH.Limit = firewall.SSHLimited, firewall.Rate{N: 5, Per: firewall.Minute}
	d.Interfaces = []firewall.Interface{{Name: "eth0", Zone: firewall.PublicZone}}
	d.Blocks = []firewall.Block{{Name: "bad", Networks: prefixes("198.51.100.0/24", "2001:db8:66::/48")}}
	temporary, err := firewall.ParseService("temporary", "8080/tcp until 2030-01-02T03:04:05Z")
	if err != nil {
		t.Fatal(err)
	}
	d.Open = append(d.Open, temporary)
	r, err := firewall.Compile(d)
	if err != nil {
		t.Fatal(err)
	}
	forward := func(c firewall.Chain) bool { return c.Forward } // the fake has no table mangle
	r.IPv4, r.IPv6 = slices.DeleteFunc(r.IPv4, forward), slices.DeleteFunc(r.IPv6, forward)
	return r
}

func (m *machine) inspect(want firewall.Ruleset) backend.Inspection {
	m.t.Helper()
	in, err := m.Inspect(context.Background(), want)
	if err != nil {
		m.t.Fatal(err)
	}
	return in
}

func (m *machine) load(want firewall.Ruleset, clear bool) backend.Inspection {
	m.t.Helper()
	was := m.inspect(want)
	if err := was.Snapshot.Load(context.Background(), want, clear); err != nil {
		m.t.Fatal(err)
	}
	return was
}

// theirs adds other programs' rules.
func (m *machine) theirs() {
	m.has(firewall.IPv4, "*nat", ":DOCKER -", "-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80",
		"*filter", ":FORWARD DROP", ":DOCKER -", ":f2b-sshd -", "-A DOCKER -j RETURN", "-A FORWARD -j DOCKER",
		"-A INPUT -m state --state RELATED,ESTABLISHED -j ACCEPT",
		"-A INPUT -p tcp -m multiport --dports 22 -j f2b-sshd",
		`-A INPUT -p tcp -m tcp --dport 22 -m comment --comment "it\'s \"odd\" \\ %" -j ACCEPT`,
		"-A INPUT -j REJECT --reject-with icmp-host-prohibited")
	m.has(firewall.IPv6, ":INPUT DROP", ":OUTPUT DROP", "-A INPUT -p ipv6-icmp -j ACCEPT")
}

// With every version: load, read back, no change, repair, and remove.
func TestVersions(t *testing.T) {
	for _, v := range versions {
		t.Run(v.name, func(t *testing.T) {
			m := newMachine(t, v.fake)
			m.theirs()
			before := m.holds()
			want := ruleset(t)
			was := m.load(want, true)
			if was.Backend != v.backend {
				t.Errorf("backend %q, want %q", was.Backend, v.backend)
			}
			var restores []string
			query := ""
			for _, r := range m.runs() {
				switch {
				case strings.Contains(r, "--test"):
					query = "wait"
				case strings.Contains(r, "-restore"):
					restores = append(restores, r)
				case strings.Contains(r, "--version"):
					query = "version"
				}
			}
			if query != v.query {
				t.Errorf("ran a query for %q, want %q", query, v.query)
			}
			if diff := cmp.Diff([]string{"iptables-restore " + v.args, "ip6tables-restore " + v.args}, restores); diff != "" {
				t.Errorf("restores (-want +got):\n%s", diff)
			}
			loaded := m.holds()
			if in := m.inspect(want); len(in.Drift) > 0 || len(in.Foreign) > 0 || !in.Present {
				t.Errorf("after loading: %v, %v", in.Drift, in.Foreign)
			}
			for _, keep := range []string{"-A FORWARD -j DOCKER", "-A INPUT -p tcp -m multiport --dports 22 -j f2b-sshd\nipv4 filter -A INPUT -j BASICFW-INPUT\n", "ipv4 filter :FORWARD DROP"} {
				if !strings.Contains(loaded, keep) {
					t.Errorf("%q is not in:\n%s", keep, loaded)
				}
			}
			tables := readTables(m.file(firewall.IPv6))
			i := chainIndex(tables["filter"], firewall.InputChain)
			lost := tables["filter"][i].Rules[7]
			tables["filter"][i].Rules = slices.Delete(tables["filter"][i].Rules, 7, 8)
			tables["filter"][i].Rules[0] = "-j ACCEPT"
			writeTables(m.file(firewall.IPv6), tables)
			in := m.inspect(want)
			if len(in.Drift) != 2 || in.Drift[0].Kind != firewall.Altered || in.Drift[0].Got != "-j ACCEPT" || in.Drift[1].Want != lost {
				t.Errorf("drift %v, want rule 1 altered and %q missing", in.Drift, lost)
			}
			m.load(want, false)
			if got := m.holds(); got != loaded {
				t.Errorf("repaired (-want +got):\n%s", cmp.Diff(loaded, got))
			}
			if err := m.Remove(context.Background(), was.Backup); err != nil {
				t.Fatal(err)
			}
			if got := m.holds(); got != before {
				t.Errorf("removed (-want +got):\n%s", cmp.Diff(before, got))
			}
		})
	}
}

// Our rules are equal after parsing, whatever the version; other programs' rules stay
// as printed.
func TestParsePrinted(t *testing.T) {
	const theirs = "-p tcp -m hashlimit --hashlimit-upto 1/sec --hashlimit-burst 5 --hashlimit-mode srcip --hashlimit-name theirs -j ACCEPT"
	for _, tt := range []struct {
		file, version string
		nft           bool // according to the header
		theirs        string
	}{
		{"save-1.4.7", "1.4.7", false, strings.Replace(theirs, " --hashlimit-burst 5", "", 1)},
		{"save-1.4.21", "1.4.21", false, theirs},
		{"save-1.8.2-nft", "1.8.2", false, theirs},
		{"save-1.8.4-nft", "1.8.4", false, theirs},
		{"save-1.8.7-nft", "1.8.7", false, strings.Replace(theirs, "-p tcp", "-p 6", 1)}, // without /etc/protocols
		{"save-1.8.13-nft", "1.8.13", true, theirs},
	} {
		t.Run(tt.file, func(t *testing.T) {
			data, err := os.ReadFile(filepath.Join("testdata", tt.file))
			if err != nil {
				t.Fatal(err)
			}
			d, err := parse(data)
			if err != nil {
				t.Fatal(err)
			}
			if d.version != tt.version || d.nft != tt.nft {
				t.Errorf("version %s, nft %v", d.version, d.nft)
			}
			want := []chain{
				{"INPUT", "DROP", []string{`-m comment --comment "it\'s \"odd\"" -j ACCEPT`, tt.theirs, jump}},
				{"FORWARD", "ACCEPT", nil},
				{"OUTPUT", "ACCEPT", nil},
				{"BASICFW-INPUT", "-", []string{
					"-i lo -m comment --comment basicfw-loopback -j ACCEPT",
					"-p ipv6-icmp -m icmp6 --icmpv6-type 133 -m comment --comment basicfw-nd -m hl --hl-eq 255 -j ACCEPT",
					"-p tcp -m tcp --dport 22 -m comment --comment basicfw-ssh -j BASICFW-SSH"}},
				{"BASICFW-SSH", "-", []string{
					"-m conntrack --ctstate NEW -m hashlimit --hashlimit-upto 5/min --hashlimit-burst 5 --hashlimit-mode srcip --hashlimit-name bfw6s5m --hashlimit-srcmask 64 -m comment --comment basicfw-ssh-limit -j ACCEPT",
					`-m limit --limit 5/sec --limit-burst 10 -m comment --comment basicfw-ssh-log -j LOG --log-prefix "basicfw drop: " --log-level 7`}},
			}
			if diff := cmp.Diff(want, d.table(filter).Chains); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// With a kernel without tables there is no header with the version.
func TestVersionOfEmptyKernel(t *testing.T) {
	for _, v := range versions {
		m := newMachine(t, v.fake)
		if in := m.inspect(ruleset(t)); in.Backend != v.backend || in.Present {
			t.Errorf("%s: backend %q, present %v", v.name, in.Backend, in.Present)
		}
		want := []string{"ip6tables-save", "iptables --version", "iptables-save"}
		if got := m.runs(); !slices.Equal(slices.Sorted(slices.Values(got)), want) {
			t.Errorf("%s: ran %q, want %q", v.name, got, want)
		}
	}
}

// A held snapshot and the version are not read again.
func TestHold(t *testing.T) {
	m := newMachine(t, versions[0].fake)
	release := m.Hold()
	want := ruleset(t)
	for range 2 {
		if in := m.inspect(want); len(in.Drift) == 0 {
			t.Error("no drift in an empty kernel")
		}
	}
	read := []string{"ip6tables-save", "iptables --version", "iptables-save"}
	if got := m.runs(); !slices.Equal(slices.Sorted(slices.Values(got)), read) {
		t.Errorf("two inspections ran %q, want %q", got, read)
	}
	m.load(want, false)
	m.runs()
	in := m.inspect(want)
	if ran := m.runs(); len(in.Drift) > 0 || len(ran) > 0 {
		t.Errorf("after loading: drift %v, and another inspection ran %q", in.Drift, ran)
	}
	if tables, err := m.Live(context.Background()); err != nil || len(tables) == 0 {
		t.Errorf("%d tables, %v", len(tables), err)
	}
	if ran := m.runs(); len(ran) > 0 {
		t.Errorf("reading the rules of all programs ran %q", ran)
	}
	m.Hold()() // within another one
	m.has(firewall.IPv4, ":INPUT ACCEPT")
	if in := m.inspect(want); len(in.Drift) > 0 {
		t.Errorf("another program's change was seen before release: %v", in.Drift)
	}
	release()
	if in := m.inspect(want); len(in.Drift) == 0 {
		t.Error("another program's change was not seen after release")
	}
}

// For a namespace known to be empty, no program is run to inspect it.
func TestHoldEmpty(t *testing.T) {
	m := newMachine(t, versions[0].fake)
	m.inspect(ruleset(t))
	version := m.Version()
	m.runs()
	m.HoldEmpty(version)
	was := m.inspect(ruleset(t))
	if ran := m.runs(); was.Present || was.Backend != versions[0].backend || len(ran) > 0 {
		t.Errorf("found %v of %s, and ran %q", was.Present, was.Backend, ran)
	}
	if err := was.Snapshot.Load(context.Background(), ruleset(t), false); err != nil {
		t.Error(err)
	}
	for _, run := range m.runs() {
		if strings.Contains(run, "--version") {
			t.Errorf("loading ran %s", run)
		}
	}
}

func TestToolsText(t *testing.T) {
	m := newMachine(t, fake{Version: "none"})
	if _, err := m.Inspect(context.Background(), ruleset(t)); err == nil || !strings.Contains(err.Error(), `printed no version, but "iptables vnone`) {
		t.Errorf("got %v", err)
	}
	for _, name := range []string{"iptables-save", "ip6tables-save"} {
		if err := os.Remove(filepath.Join(m.dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	_, err := m.Inspect(context.Background(), ruleset(t))
	var missing *MissingError
	if !errors.As(err, &missing) || !strings.Contains(err.Error(), "tables-save in ") || !strings.Contains(hint.Of(err), "install iptables") || strings.Contains(err.Error(), "\n") {
		t.Errorf("got %v", err)
	}
}

// A load waits for the lock that another program holds, for a limited time.
func TestLock(t *testing.T) {
	for _, tt := range []struct {
		name        string
		waits, long bool // whether it waits, and whether to test the time limit
	}{
		{"1.4.7", false, false}, {"1.4.21", true, true}, {"1.4.21 of EL7", true, false}, {"1.6.1", true, false},
		{"1.6.2", true, true}, {"1.8.9 legacy", true, false}, {"1.8.13 nft", false, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := newMachine(t, old(t, tt.name))
			want := ruleset(t)
			m.theirs()
			before := m.holds()
			hold := func() func() {
				unlock, err := m.sys.Lock(context.Background(), lockFile, "")
				if err != nil {
					t.Fatal(err)
				}
				return unlock
			}
			was, unlock := m.inspect(want), hold()
			const held = 100 * time.Millisecond
			start := time.Now()
			time.AfterFunc(held, unlock)
			if err := was.Snapshot.Load(context.Background(), want, true); err != nil {
				t.Fatal(err)
			}
			if took := time.Since(start); tt.waits && took < held {
				t.Errorf("did not wait for the lock: took %v", took)
			}
			if err := m.Remove(context.Background(), was.Backup); err != nil {
				t.Fatal(err)
			}
			if !tt.long {
				return
			}
			unlock = hold()
			defer unlock()
			m.runs()
			err := was.Snapshot.Load(context.Background(), want, true)
			if err == nil || !strings.Contains(err.Error(), "another program held the xtables lock (/run/xtables.lock) for more than 1s") {
				t.Errorf("got %v", err)
			}
			if got := m.holds(); got != before {
				t.Errorf("changed without the lock:\n%s", cmp.Diff(before, got))
			}
			n := 0
			for _, r := range m.runs() {
				if strings.Contains(r, "-restore") && !strings.Contains(r, "--test") {
					n++
				}
			}
			if n > 1 {
				t.Errorf("waited %d times", n)
			}
		})
	}
	t.Run("canceled", func(t *testing.T) {
		m := newMachine(t, old(t, "1.4.21"))
		unlock, err := m.sys.Lock(context.Background(), lockFile, "")
		if err != nil {
			t.Fatal(err)
		}
		defer unlock()
		was := m.inspect(ruleset(t))
		ctx, cancel := context.WithCancel(context.Background())
		time.AfterFunc(50*time.Millisecond, cancel)
		var locked *lockError
		if err := was.Snapshot.Load(ctx, ruleset(t), false); !errors.Is(err, context.Canceled) || errors.As(err, &locked) {
			t.Errorf("got %v", err)
		}
	})
}

// The error names the refused rule, whichever program or kernel refused it, and
// nothing has changed.
func TestRefused(t *testing.T) {
	const ping = `"-A BASICFW-INPUT -p ipv6-icmp -m icmp6 --icmpv6-type 128 -m hashlimit`
	for _, version := range []string{"1.4.7", "1.4.21", "1.6.2", "1.8.2 nft", "1.8.7 nft", "1.8.13 nft"} {
		for _, tt := range []struct {
			name   string
			refuse func(*fake)
			want   string
		}{
			{"program", func(f *fake) { f.NoMatch = "hashlimit" }, `loading the ipv4 rules: "-A BASICFW-INPUT -p icmp -m icmp --icmp-type 8 -m hashlimit`},
			{"kernel", func(f *fake) { f.Refuse = "icmpv6-type 128" }, "loading the ipv6 rules: " + ping},
			{"kernel, first rule", func(f *fake) { f.Refuse = "basicfw-loopback" }, `loading the ipv4 rules: "-A BASICFW-INPUT -i lo`},
			{"kernel, last chain", func(f *fake) { f.Refuse = "basicfw-ssh-drop" }, `loading the ipv4 rules: "-A BASICFW-SSH -m comment --comment basicfw-ssh-drop`},
		} {
			t.Run(version+" "+tt.name, func(t *testing.T) {
				f := old(t, version)
				tt.refuse(&f)
				m := newMachine(t, f)
				m.theirs()
				before, want := m.holds(), ruleset(t)
				err := m.inspect(want).Snapshot.Load(context.Background(), want, true)
				if err == nil || !strings.HasPrefix(err.Error(), tt.want) {
					t.Errorf("got %v, want %s", err, tt.want)
				}
				if got := m.holds(); got != before {
					t.Errorf("not as before (-want +got):\n%s", cmp.Diff(before, got))
				}
			})
		}
	}
}

// One of our chains that another program's rule jumps to cannot be removed.
func TestChainInUse(t *testing.T) {
	for _, name := range []string{"1.4.21", "1.8.7 nft"} {
		m := newMachine(t, old(t, name))
		was := m.load(ruleset(t), false)
		m.has(firewall.IPv6, "-A FORWARD -j BASICFW-SSH")
		before := m.holds()
		err := m.Remove(context.Background(), was.Backup)
		if err == nil || !strings.Contains(err.Error(), `removing the ipv6 rules: "-X BASICFW-SSH": a rule of another chain jumps to BASICFW-SSH: `) ||
			!strings.Contains(hint.Of(err), `delete that rule ("ip6tables-save | grep -w BASICFW-SSH" shows it)`) {
			t.Errorf("%s: %v", name, err)
		}
		if got := m.holds(); got != before {
			t.Errorf("%s: not as before (-want +got):\n%s", name, cmp.Diff(before, got))
		}
	}
}

// If no single rule is refused, the error names none.
func TestRefusedTogether(t *testing.T) {
	m := newMachine(t, fake{Version: "1.4.21", MaxRules: 20})
	m.theirs()
	before, want := m.holds(), ruleset(t)
	err := m.inspect(want).Snapshot.Load(context.Background(), want, false)
	if err == nil || !strings.HasPrefix(err.Error(), "loading the ipv4 rules: iptables-restore --noflush: exit status 1: iptables-restore: line ") {
		t.Errorf("got %v", err)
	}
	if got := m.holds(); got != before {
		t.Errorf("not as before (-want +got):\n%s", cmp.Diff(before, got))
	}
}

// A table that another program changed between reading and loading is refused as a
// whole, and loading is retried.
func TestBusy(t *testing.T) {
	for _, name := range []string{"1.4.7", "1.4.21", "1.8.9 legacy"} {
		f := old(t, name)
		f.Busy = 5
		m := newMachine(t, f)
		m.load(ruleset(t), false)
		if in := m.inspect(ruleset(t)); len(in.Drift) > 0 {
			t.Errorf("%s: %v", name, in.Drift)
		}
	}
}

// If a deletion is refused, INPUT is rewritten, unless another program changed it since
// it was read.
func TestNoDelete(t *testing.T) {
	const recent = "-p tcp -m tcp --dport 22 -m recent --update --seconds 60 --name DEFAULT --rsource -j DROP"
	want := ruleset(t)
	setup := func(t *testing.T) (*machine, backend.Inspection, string) {
		m := newMachine(t, fake{Version: "1.8.9", NFT: true, NoDelete: "-m recent"})
		m.has(firewall.IPv4, ":f2b -", "-A INPUT -p tcp -j f2b", "-A INPUT "+recent, "-A INPUT -m mark --mark 0x1 -j f2b")
		m.has(firewall.IPv6)
		return m, m.inspect(want), m.holds()
	}
	t.Run("rewritten", func(t *testing.T) {
		m, was, before := setup(t)
		if err := was.Snapshot.Load(context.Background(), want, true); err != nil {
			t.Fatal(err)
		}
		if got := m.holds(); !strings.Contains(got, "-A INPUT -p tcp -j f2b\nipv4 filter -A INPUT -m mark --mark 0x1 -j f2b\nipv4 filter -A INPUT -j BASICFW-INPUT\n") {
			t.Errorf("INPUT is\n%s", got)
		}
		m.become(fake{Version: "1.8.9", NFT: true, NoDelete: jump})
		if err := m.Remove(context.Background(), was.Backup); err != nil {
			t.Fatal(err)
		}
		if got := m.holds(); got != before {
			t.Errorf("removed (-want +got):\n%s", cmp.Diff(before, got))
		}
	})
	t.Run("changed meanwhile", func(t *testing.T) {
		m, was, _ := setup(t)
		m.has(firewall.IPv4, "-A INPUT -p udp -j f2b")
		before := m.holds()
		err := was.Snapshot.Load(context.Background(), want, true)
		if err == nil || !strings.Contains(err.Error(), `"-D INPUT `+recent) {
			t.Errorf("got %v", err)
		}
		if got := m.holds(); got != before {
			t.Errorf("changed despite the error (-want +got):\n%s", cmp.Diff(before, got))
		}
	})
	t.Run("removed meanwhile", func(t *testing.T) {
		m, was, _ := setup(t)
		m.become(fake{Version: "1.8.9", NFT: true})
		writeTables(m.file(firewall.IPv4), fakeTables{"filter": {{"INPUT", "ACCEPT", nil}, {"FORWARD", "ACCEPT", nil}, {"OUTPUT", "ACCEPT", nil}}})
		before := m.holds()
		if err := was.Snapshot.Load(context.Background(), want, true); err == nil {
			t.Error("no error")
		}
		if got := m.holds(); got != before {
			t.Errorf("changed despite the error (-want +got):\n%s", cmp.Diff(before, got))
		}
	})
}

// If the rules are read back differently, both families are rolled back.
func TestReadBack(t *testing.T) {
	f := old(t, "1.8.9 legacy")
	f.Alter = [2]string{"--dport 443", "--dport 444"}
	m := newMachine(t, f)
	m.theirs()
	before, want := m.holds(), ruleset(t)
	err := m.inspect(want).Snapshot.Load(context.Background(), want, true)
	if err == nil || !strings.Contains(err.Error(), "the kernel's rules differ from those that were loaded: ipv4 BASICFW-INPUT: altered: -p tcp -m tcp --dport 444") {
		t.Errorf("got %v", err)
	}
	if got := m.holds(); got != before {
		t.Errorf("not as before (-want +got):\n%s", cmp.Diff(before, got))
	}
}

// Each run of a program fails once, during load, repair and removal. Both families
// then have the previous rules.
func TestEachRunFails(t *testing.T) {
	want := ruleset(t)
	broken := errors.New("broken")
	for _, op := range []struct {
		name  string
		setup func(*machine) backend.Inspection
		do    func(*machine, backend.Inspection) error
	}{
		{"load", func(m *machine) backend.Inspection { m.theirs(); return m.inspect(want) },
			func(m *machine, was backend.Inspection) error {
				return was.Snapshot.Load(context.Background(), want, true)
			}},
		{"repair", func(m *machine) backend.Inspection {
			m.theirs()
			m.load(want, true)
			m.has(firewall.IPv6, "-A BASICFW-INPUT -j ACCEPT")
			m.has(firewall.IPv4, ":BASICFW-OLD -", "-A BASICFW-SSH -j BASICFW-OLD", "-A INPUT -j BASICFW-OLD")
			return m.inspect(want)
		}, func(m *machine, was backend.Inspection) error {
			return was.Snapshot.Load(context.Background(), want, false)
		}},
		{"remove", func(m *machine) backend.Inspection { m.theirs(); return m.load(want, true) },
			func(m *machine, was backend.Inspection) error { return m.Remove(context.Background(), was.Backup) }},
	} {
		t.Run(op.name, func(t *testing.T) {
			failed := 0
			for n := 1; ; n++ {
				m := newMachine(t, old(t, "1.4.21"))
				was := op.setup(m)
				before := m.holds()
				count := 0
				m.sys.Step = lab.Before(func(string, string) error {
					if count++; count == n {
						return broken
					}
					return nil
				})
				err := op.do(m, was)
				m.sys.Step = nil
				if err == nil && count < n {
					break // there was no run n
				}
				failed++
				if !errors.Is(err, broken) {
					t.Fatalf("run %d fails: the error is %v", n, err)
				}
				if got := m.holds(); got != before {
					t.Errorf("run %d fails: %v; not as before (-want +got):\n%s", n, err, cmp.Diff(before, got))
				}
			}
			if failed < 4 {
				t.Errorf("only %d runs of programs", failed)
			}
		})
	}
}

// If the rollback fails as well, the error says so.
func TestRollbackFails(t *testing.T) {
	want := ruleset(t)
	m := newMachine(t, old(t, "1.8.13 nft"))
	m.theirs()
	was := m.inspect(want)
	broken := errors.New("broken")
	m.sys.Step = lab.Before(func(_, name string) error {
		if strings.HasPrefix(name, "ip6tables-restore") {
			m.sys.Step = lab.Before(func(_, name string) error {
				if strings.HasPrefix(name, "iptables-restore") {
					return broken
				}
				return nil
			})
			return errors.New("first")
		}
		return nil
	})
	err := was.Snapshot.Load(context.Background(), want, true)
	if !errors.Is(err, broken) || !strings.Contains(err.Error(), "loading the ipv6 rules: ip6tables-restore --noflush: first; and restoring the previous rules failed: restoring the ipv4 rules") {
		t.Errorf("got %v", err)
	}
}

// A canceled context does not prevent the rollback.
func TestRollbackAfterCancel(t *testing.T) {
	want := ruleset(t)
	m := newMachine(t, old(t, "1.6.2"))
	m.theirs()
	was, before := m.inspect(want), m.holds()
	ctx, cancel := context.WithCancel(context.Background())
	m.sys.Step = lab.Before(func(_, name string) error {
		if strings.HasPrefix(name, "ip6tables-restore") {
			cancel()
		}
		return nil
	})
	if err := was.Snapshot.Load(ctx, want, true); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if got := m.holds(); got != before {
		t.Errorf("not as before (-want +got):\n%s", cmp.Diff(before, got))
	}
}

func tableOf(t *testing.T, lines ...string) table {
	t.Helper()
	d, err := parse([]byte("*filter\n" + strings.Join(lines, "\n") + "\nCOMMIT\n"))
	if err != nil {
		t.Fatal(err)
	}
	return d.table(filter)
}

func TestLines(t *testing.T) {
	const (
		f2b    = "-p tcp -j f2b"
		ssh    = "-p tcp -m tcp --dport 22 -j ACCEPT"
		reject = "-j REJECT --reject-with icmp-host-prohibited"
	)
	ours := []chain{{firewall.InputChain, "-", []string{"-i lo -j ACCEPT", "-p tcp -j BASICFW-SSH"}}, {firewall.SSHChain, "-", []string{"-j DROP"}}}
	base := []string{":INPUT ACCEPT [0:0]", ":FORWARD DROP [0:0]", ":OUTPUT ACCEPT [0:0]", ":f2b - [0:0]"}
	with := func(lines ...string) []string { return slices.Concat(base, lines) }
	stale := with(":BASICFW-INPUT - [0:0]", ":BASICFW-OLD - [0:0]", "-A INPUT "+f2b, "-A INPUT "+jump, "-A INPUT -s 192.0.2.1/32 -j BASICFW-OLD", "-A BASICFW-INPUT -j BASICFW-OLD")
	stock := with("-A INPUT "+ssh, "-A INPUT "+f2b, "-A INPUT "+reject)
	for _, tt := range []struct {
		name  string
		lines []string
		want  string
	}{
		{"load into an empty kernel", loadLines(table{Name: filter}, ours, true, false), `*filter
:INPUT DROP [0:0]
:OUTPUT ACCEPT [0:0]
:BASICFW-INPUT - [0:0]
:BASICFW-SSH - [0:0]
-A INPUT -j BASICFW-INPUT
-A BASICFW-INPUT -i lo -j ACCEPT
-A BASICFW-INPUT -p tcp -j BASICFW-SSH
-A BASICFW-SSH -j DROP
COMMIT`},
		{"load over the stock rules", loadLines(tableOf(t, stock...), ours[:1], true, false), `*filter
:INPUT DROP [0:0]
:OUTPUT ACCEPT [0:0]
:BASICFW-INPUT - [0:0]
-D INPUT ` + ssh + `
-D INPUT ` + reject + `
-A INPUT -j BASICFW-INPUT
-A BASICFW-INPUT -i lo -j ACCEPT
-A BASICFW-INPUT -p tcp -j BASICFW-SSH
COMMIT`},
		{"load with rewrite", loadLines(tableOf(t, stock...), ours[1:], true, true), `*filter
:INPUT DROP [0:0]
:OUTPUT ACCEPT [0:0]
:BASICFW-SSH - [0:0]
-F INPUT
-A INPUT ` + f2b + `
-A INPUT -j BASICFW-INPUT
-A BASICFW-SSH -j DROP
COMMIT`},
		{"load before a rule that closes", loadLines(tableOf(t, stock...), ours[1:], false, false), `*filter
:INPUT DROP [0:0]
:OUTPUT ACCEPT [0:0]
:BASICFW-SSH - [0:0]
-I INPUT 3 -j BASICFW-INPUT
-A BASICFW-SSH -j DROP
COMMIT`},
		{"load over stale rules", loadLines(tableOf(t, stale...), ours[:1], false, false), `*filter
:INPUT DROP [0:0]
:OUTPUT ACCEPT [0:0]
:BASICFW-INPUT - [0:0]
:BASICFW-OLD - [0:0]
-D INPUT -j BASICFW-INPUT
-D INPUT -s 192.0.2.1/32 -j BASICFW-OLD
-A INPUT -j BASICFW-INPUT
-A BASICFW-INPUT -i lo -j ACCEPT
-A BASICFW-INPUT -p tcp -j BASICFW-SSH
-X BASICFW-OLD
COMMIT`},
		{"load with INPUT unchanged", loadLines(tableOf(t, with(":BASICFW-INPUT - [0:0]", "-A INPUT "+f2b, "-A INPUT "+jump)...), ours[1:], false, false), `*filter
:INPUT DROP [0:0]
:OUTPUT ACCEPT [0:0]
:BASICFW-SSH - [0:0]
:BASICFW-INPUT - [0:0]
-A BASICFW-SSH -j DROP
-X BASICFW-INPUT
COMMIT`},
		{"revert to the stock rules, other programs' later rules stay", revertLines(tableOf(t, with(":BASICFW-INPUT - [0:0]", "-A INPUT "+f2b, "-A INPUT -p udp -j f2b", "-A INPUT "+jump)...), tableOf(t, stock...), nil), `*filter
:INPUT ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:BASICFW-INPUT - [0:0]
-F INPUT
-A INPUT -p udp -j f2b
-A INPUT ` + ssh + `
-A INPUT ` + f2b + `
-A INPUT ` + reject + `
-X BASICFW-INPUT
COMMIT`},
		{"revert to stale rules", revertLines(tableOf(t, with(":BASICFW-INPUT - [0:0]", ":BASICFW-SSH - [0:0]", "-A INPUT "+f2b, "-A INPUT "+jump)...), tableOf(t, stale...), nil), `*filter
:INPUT ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:BASICFW-INPUT - [0:0]
:BASICFW-OLD - [0:0]
:BASICFW-SSH - [0:0]
-F INPUT
-A INPUT ` + f2b + `
-A INPUT -j BASICFW-INPUT
-A INPUT -s 192.0.2.1/32 -j BASICFW-OLD
-A BASICFW-INPUT -j BASICFW-OLD
-X BASICFW-SSH
COMMIT`},
		{"revert rules that a removal restored", revertLines(tableOf(t, stock...), tableOf(t, with("-A INPUT "+f2b)...), []string{ssh, reject}), `*filter
:INPUT ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
-F INPUT
-A INPUT ` + f2b + `
COMMIT`},
		{"remove all", removeLines(tableOf(t, with(":BASICFW-INPUT - [0:0]", ":BASICFW-SSH - [0:0]", "-A INPUT "+f2b, "-A INPUT "+jump)...), backend.FamilyBackup{}, false), `*filter
:INPUT ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:BASICFW-INPUT - [0:0]
:BASICFW-SSH - [0:0]
-D INPUT -j BASICFW-INPUT
-X BASICFW-INPUT
-X BASICFW-SSH
COMMIT`},
		{"remove, rules are appended", removeLines(tableOf(t, with(":BASICFW-INPUT - [0:0]", "-A INPUT "+f2b, "-A INPUT "+reject, "-A INPUT "+jump)...),
			backend.FamilyBackup{Input: "DROP", Output: "DROP", Removed: []string{ssh, reject}}, false), `*filter
:INPUT DROP [0:0]
:OUTPUT DROP [0:0]
:BASICFW-INPUT - [0:0]
-D INPUT -j BASICFW-INPUT
-A INPUT ` + ssh + `
-X BASICFW-INPUT
COMMIT`},
		{"remove with rewrite", removeLines(tableOf(t, with(":BASICFW-INPUT - [0:0]", "-A INPUT "+f2b, "-A INPUT "+jump)...), backend.FamilyBackup{Removed: []string{reject}}, true), `*filter
:INPUT ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:BASICFW-INPUT - [0:0]
-F INPUT
-A INPUT ` + f2b + `
-A INPUT ` + reject + `
-X BASICFW-INPUT
COMMIT`},
		{"remove, former order", removeLines(tableOf(t, with(":BASICFW-INPUT - [0:0]", "-A INPUT "+f2b, "-A INPUT "+jump)...),
			backend.FamilyBackup{Removed: []string{ssh, reject}, Places: []int{0, 1}, Stayed: checksum([]string{f2b})}, false), `*filter
:INPUT ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:BASICFW-INPUT - [0:0]
-F INPUT
-A INPUT ` + ssh + `
-A INPUT ` + f2b + `
-A INPUT ` + reject + `
-X BASICFW-INPUT
COMMIT`},
	} {
		if diff := cmp.Diff(tt.want, strings.Join(tt.lines, "\n")); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, diff)
		}
	}
}

// The effect of other programs' rules in INPUT, before our jump and behind it.
func TestForeign(t *testing.T) {
	const (
		all      = "accepts new connections to every port"
		some     = "accepts matching packets, regardless of the profile"
		nothing  = "accepts what is accepted anyway"
		shut     = "drops everything before our rules: no port answers, not even SSH"
		dropSome = "drops matching packets, regardless of the profile"
		late     = "drops what would be dropped anyway"
	)
	for _, tt := range []struct{ rule, before, behind string }{
		{"-j ACCEPT", all, all},
		{"-p tcp -j ACCEPT", all, all},
		{"-m state --state NEW,RELATED,ESTABLISHED -j ACCEPT", all, all},
		{"-m comment --comment hello -j ACCEPT", all, all},
		{"! -i eth9 -j ACCEPT", all, all},
		{"-p tcp -m tcp --dport 3306 -j ACCEPT", some, some},
		{"-s 192.0.2.0/24 -j ACCEPT", some, some},
		{"-i eth1 -j ACCEPT", all, all},
		{"-p icmp -j ACCEPT", some, some},
		{"-i lo -j ACCEPT", nothing, nothing},
		{"-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT", nothing, nothing},
		{"-j DROP", shut, late},
		{"-m comment --comment the-end -j REJECT --reject-with icmp-port-unreachable", shut, late},
		{"-s 192.0.2.1/32 -j DROP", dropSome, late},
		{"-p tcp -m tcp --dport 25 -j REJECT --reject-with tcp-reset", dropSome, late},
		{"-m recent --update --seconds 60 --name bad --rsource -j DROP", dropSome, late},
		{"-j NFQUEUE --queue-num 0", shut, late},
		{"-m set --match-set bans src -j DROP", "", ""}, // another program's list
		{"-j f2b", "", ""},
		{"-p tcp -j LOG", "", ""},
	} {
		for i, want := range []string{tt.before, tt.behind} {
			rules := []string{":INPUT DROP [0:0]", ":BASICFW-INPUT - [0:0]", "-A INPUT " + tt.rule, "-A INPUT " + jump}
			if i == 1 {
				rules[2], rules[3] = rules[3], rules[2]
			}
			snap := snapshot{firewall.IPv4: dump{tables: []table{tableOf(t, rules...)}}}
			in := inspect(snap, firewall.Families[:1], nil)
			got := ""
			if len(in.Foreign) > 0 {
				got = in.Foreign[0].Effect
			}
			if got != want {
				t.Errorf("%s, behind our jump %v: %q, want %q", tt.rule, i == 1, got, want)
			}
			if removed := in.Backup.IPv4.Removed; want != "" && !slices.Equal(removed, []string{tt.rule}) || want == "" && len(removed) > 0 {
				t.Errorf("%s: to be removed: %q", tt.rule, removed)
			}
		}
	}
}

func TestInspectConflicts(t *testing.T) {
	d, err := parse([]byte(`*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT DROP [0:0]
:ufw-before-input - [0:0]
:INPUT_ZONES - [0:0]
:INPUT_direct - [0:0]
:net-fw - [0:0]
:ufw6-before-input - [0:0]
-A INPUT -j ufw-before-input
-A ufw-before-input -i lo -j ACCEPT
COMMIT
`))
	if err != nil {
		t.Fatal(err)
	}
	in := inspect(snapshot{firewall.IPv4: d}, firewall.Families[:1], nil)
	if want := []string{"ufw", "firewalld", "shorewall"}; !slices.Equal(in.Conflicts, want) {
		t.Errorf("conflicts %q, want %q", in.Conflicts, want)
	}
	// A stopped ufw leaves empty chains.
	if d, err = parse([]byte("*filter\n:INPUT ACCEPT [0:0]\n:ufw-before-input - [0:0]\n-A INPUT -j ufw-before-input\nCOMMIT\n")); err != nil {
		t.Fatal(err)
	}
	if stopped := inspect(snapshot{firewall.IPv4: d}, firewall.Families[:1], nil); len(stopped.Conflicts) > 0 {
		t.Errorf("conflicts %q with empty ufw chains", stopped.Conflicts)
	}
	if in.Present || in.Backup.IPv4.Input != "ACCEPT" || in.Backup.IPv4.Output != "DROP" {
		t.Errorf("present %v, before %+v", in.Present, in.Backup.IPv4)
	}
}

// TestModel checks that the model of a ruleset opens what the ruleset opens, in each family.
func TestModel(t *testing.T) {
	r, err := firewall.Compile(firewall.Desired{
		Profile: firewall.Profile{Services: []firewall.Service{{Name: "http", Proto: firewall.TCP, Ports: firewall.Port(80)}}},
		SSH:     firewall.SSH{Ports: []uint16{22}, Mode: firewall.SSHPinned, Allow: []netip.Prefix{netip.MustParsePrefix("203.0.113.9/32"), netip.MustParsePrefix("2001:db8:1::/64")}},
	})
	if err != nil {
		t.Fatal(err)
	}
	host := exposure.Host{Type: func(netip.Addr) string { return "LOCAL" }}
	for i, to := range []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")} {
		client := netip.MustParseAddr([]string{"203.0.113.9", "2001:db8:1::9"}[i])
		stranger := netip.MustParseAddr([]string{"203.0.113.10", "2001:db8:2::9"}[i])
		for port, want := range map[uint16][2]bool{22: {true, false}, 80: {true, true}, 81: {false, false}} {
			p := exposure.Packet{Family: firewall.Families[i], In: "eth0", Dst: to, DstType: "LOCAL", Proto: 6, DstPort: port, TCPFlags: 2}
			sure, perhaps := Model(r).Trace(p, exposure.All(to), host, false).Open()
			if got := [2]bool{sure.Contains(client), sure.Contains(stranger)}; got != want || len(perhaps) > 0 {
				t.Errorf("%v port %d is open to the client and to a stranger: %v, perhaps to %v; want %v", to, port, got, perhaps, want)
			}
		}
	}
}

func TestDrift(t *testing.T) {
	ours := []chain{{firewall.InputChain, "-", []string{"-i lo -j ACCEPT", "-p udp -j DROP"}}, {firewall.SSHChain, "-", []string{"-j DROP"}}}
	good := []string{":INPUT DROP [0:0]", ":OUTPUT ACCEPT [0:0]", ":BASICFW-INPUT - [0:0]", ":BASICFW-SSH - [0:0]", ":f2b - [0:0]",
		"-A INPUT -p tcp -j f2b", "-A INPUT " + jump, "-A BASICFW-INPUT -i lo -j ACCEPT", "-A BASICFW-INPUT -p udp -j DROP", "-A BASICFW-SSH -j DROP"}
	without := func(line string) []string {
		return slices.DeleteFunc(slices.Clone(good), func(l string) bool { return l == line })
	}
	with := func(lines ...string) []string { return slices.Concat(good, lines) }
	for _, tt := range []struct {
		name  string
		lines []string
		want  []string
	}{
		{"none", good, nil},
		{"policies", append([]string{":INPUT ACCEPT [0:0]", ":OUTPUT DROP [0:0]"}, good[2:]...),
			[]string{"ipv4 INPUT: altered: policy ACCEPT, want policy DROP", "ipv4 OUTPUT: altered: policy DROP, want policy ACCEPT"}},
		{"no jump", without("-A INPUT " + jump), []string{"ipv4 INPUT: missing: -j BASICFW-INPUT"}},
		{"two jumps", with("-A INPUT " + jump), []string{"ipv4 INPUT: extra: -j BASICFW-INPUT, 2 times"}},
		{"another program's rule behind ours", with("-A INPUT -p udp -j f2b"), []string{"ipv4 INPUT: altered: -j BASICFW-INPUT as rule 2, want -j BASICFW-INPUT as rule 3"}},
		{"restricted jump", append(without("-A INPUT "+jump), "-A INPUT -p tcp "+jump), []string{"ipv4 INPUT: extra: -p tcp -j BASICFW-INPUT", "ipv4 INPUT: missing: -j BASICFW-INPUT"}},
		{"goto", with("-A INPUT -g BASICFW-SSH"), []string{"ipv4 INPUT: extra: -g BASICFW-SSH"}},
		{"rule missing", without("-A BASICFW-SSH -j DROP"), []string{"ipv4 BASICFW-SSH: missing: -j DROP"}},
		{"rule extra", with("-A BASICFW-SSH -j ACCEPT"), []string{"ipv4 BASICFW-SSH: extra: -j ACCEPT"}},
		{"rule altered", append(without("-A BASICFW-SSH -j DROP"), "-A BASICFW-SSH -j RETURN"), []string{"ipv4 BASICFW-SSH: altered: -j RETURN, want -j DROP"}},
		{"chain missing", slices.DeleteFunc(slices.Clone(good), func(l string) bool { return strings.Contains(l, "BASICFW-SSH") }),
			[]string{"ipv4 BASICFW-SSH: missing: the chain", "ipv4 BASICFW-SSH: missing: -j DROP"}},
		{"chain extra", with(":BASICFW-OLD - [0:0]"), []string{"ipv4 BASICFW-OLD: extra: the chain"}},
	} {
		var got []string
		for _, d := range effectsOf(tableOf(t, tt.lines...)).drift(firewall.IPv4, ours) {
			got = append(got, d.String())
		}
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, diff)
		}
	}
}

func TestCanonical(t *testing.T) {
	for in, want := range map[string]string{
		"-j DROP": "-j DROP",
		"-m hl --hl-eq 255 -m comment --comment basicfw-nd -j ACCEPT": "-m comment --comment basicfw-nd -m hl --hl-eq 255 -j ACCEPT",
		"-m hl --hl-gt 255 -m comment --comment x":                    "-m comment --comment x -m hl --hl-gt 255",
		"-m comment --comment hl -m hl --hl-eq 255 -j ACCEPT":         "-m comment --comment hl -m hl --hl-eq 255 -j ACCEPT",
		"-m hl --hl-eq 255 -m comment":                                "-m hl --hl-eq 255 -m comment",
		"-p 58 -m icmp6 -j DROP":                                      "-p ipv6-icmp -m icmp6 -j DROP",
		"-p icmpv6 -m icmp6 -j DROP":                                  "-p ipv6-icmp -m icmp6 -j DROP",
		"! -p 6 -j DROP":                                              "! -p tcp -j DROP",
		"-p 17":                                                       "-p udp",
		"-p 1":                                                        "-p icmp",
		"-p 132 -j DROP":                                              "-p sctp -j DROP",
		"-p vrrp -j ACCEPT":                                           "-p 112 -j ACCEPT",
		"-p":                                                          "-p",
		"-m hashlimit --hashlimit-upto":                               "-m hashlimit --hashlimit-upto",
		"-m hashlimit --hashlimit-upto 5/min --hashlimit-name x":       "-m hashlimit --hashlimit-upto 5/min --hashlimit-burst 5 --hashlimit-name x",
		"-m hashlimit --hashlimit-upto 5/min --hashlimit-burst 6 -j A": "-m hashlimit --hashlimit-upto 5/min --hashlimit-burst 6 -j A",
		"-m conntrack --ctdir REPLY-j RETURN":                          "-m conntrack --ctdir REPLY -j RETURN",
		"-m conntrack --ctdir REPLY":                                   "-m conntrack --ctdir REPLY",
		"-m conntrack --ctdir":                                         "-m conntrack --ctdir",
		"-m time --datestop 2026-01-02T03:04:05 --utc -j ACCEPT":       "-m time --datestop 2026-01-02T03:04:05 -j ACCEPT",
		"-m time --datestop 2026-01-02T03:04:05 -j ACCEPT":             "-m time --datestop 2026-01-02T03:04:05 --kerneltz -j ACCEPT",
		"-m time --datestop":                                           "-m time --datestop",
	} {
		if got := strings.Join(canonical(strings.Split(in, " "), newTools("1.4.7", false)), " "); got != want {
			t.Errorf("%s: got %s, want %s", in, got, want)
		}
	}
}

func TestWaitIsNotShortened(t *testing.T) {
	if b := New(&system.System{}, nil); b.lockWait != 10*time.Second {
		t.Errorf("waits %v for the lock", b.lockWait)
	}
}

func TestRefusedLine(t *testing.T) {
	lines := []string{"*filter", "-A A -j B", "COMMIT"}
	for stderr, want := range map[string]string{
		"iptables-restore: line 2 failed": "-A A -j B",
		"iptables-restore: line 2 failed: Bad rule (does a matching rule exist in that chain?).":                       "-A A -j B",
		"iptables-restore v1.4.7: Couldn't find match `x' Error occurred at line: 2 Try `iptables-restore -h'":         "-A A -j B",
		"iptables-restore v1.8.9 (nf_tables): line 2: RULE_APPEND failed (No such file or directory): rule in chain A": "-A A -j B",
		"iptables-restore v1.8.4 (nf_tables): line 3: CHAIN_USER_DEL failed (Device or resource busy): chain A":        "COMMIT",
		"iptables-restore: line 4 failed":                    "",
		"iptables-restore: line 0 failed":                    "",
		"iptables-restore: line 99999999999999999999 failed": "",
		"Fatal: can't open lock file":                        "",
	} {
		err := fmt.Errorf("loading: %w", &system.ExitError{Code: 1, Stderr: stderr})
		if got := refusedLine(lines, err); got != want {
			t.Errorf("%s: %q, want %q", stderr, got, want)
		}
	}
	if got := refusedLine(lines, errors.New("line 2 failed")); got != "" {
		t.Errorf("not a program's error: %q", got)
	}
}

// TestChanges checks that the fingerprint of the rules differs after a change of any table,
// and only then: each output has a time, and the counters of policies.
func TestChanges(t *testing.T) {
	changes := func(when, counters, nat string) string {
		d, err := parse([]byte("# Generated by iptables-save v1.4.21 on " + when + "\n*nat\n:PREROUTING ACCEPT " + counters + "\n" + nat + "COMMIT\n# Completed on " + when + "\n"))
		if err != nil {
			t.Fatal(err)
		}
		return inspect(snapshot{firewall.IPv4: d}, firewall.Families[:1], nil).Changes
	}
	before := changes("Mon Nov 23 10:00:00 2026", "[0:0]", "")
	if after := changes("Mon Nov 23 10:00:10 2026", "[7:420]", ""); after != before {
		t.Errorf("%q without a change, was %q", after, before)
	}
	if after := changes("Mon Nov 23 10:00:00 2026", "[0:0]", "-A PREROUTING -p tcp -j REDIRECT\n"); after == before {
		t.Errorf("%q after a change", after)
	}
}
