package store

import (
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/agent/backend"
	"github.com/basicfw/basicfw-agent/agent/files"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/host"
	"github.com/basicfw/basicfw-agent/agent/system"
)

// written returns states as the program writes them: one with everything temporary,
// and the failsafe one.
func written(f *testing.F) []State {
	f.Helper()
	until := time.Date(2031, 5, 6, 7, 8, 9, 0, time.UTC)
	client := netip.MustParsePrefix("2001:db8::/64")
	full := State{
		InstanceID: "i-1", SSHFixed: true, SSHPorts: []string{"22: test"}, Service: true, RolledBack: "why", RescueArgument: "basicfw.unlock=5m",
		Profile: Choice{"mine", "flag", "because"}, Backend: Choice{"iptables", "auto", "it is there"},
		Client:  Client{Allow: []netip.Prefix{client}, Source: "named", Reason: "client_ip"},
		Allowed: []Allowed{{From: client, Until: until, Reason: "ssh allow"}},
		Desired: firewall.Desired{
			Profile: firewall.Profile{Name: "mine", Services: []firewall.Service{
				{Name: "http", Proto: firewall.TCP, Ports: firewall.Port(80), On: "any"},
				{Name: "db", Proto: firewall.TCP, Ports: firewall.Port(5432), On: "any", From: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}, Until: until}}},
			SSH:    firewall.SSH{Ports: []uint16{22}, Mode: firewall.SSHPinned, Allow: []netip.Prefix{client}, Timed: []firewall.TimedSource{{From: netip.MustParsePrefix("192.0.2.9/32"), Until: until}}},
			Unlock: &firewall.Unlock{Window: firewall.NewWindow(firewall.Moment{Time: until, Boot: "b", Uptime: time.Hour}, time.Minute)},
		},
	}
	safe := State{Failsafe: "why", Desired: firewall.Failsafe([]uint16{22, 2222})}
	var err error
	for _, st := range []*State{&full, &safe} {
		if st.Ruleset, err = firewall.Compile(st.Desired); err != nil {
			f.Fatal(err)
		}
	}
	return []State{full, safe}
}

// fuzz puts any text into a file of the store. If that can be read, it must not change
// when it is written and read again.
func fuzz[T any](f *testing.F, path string, seeds []T, load func(*Store) (T, error), save func(*Store, T) error, use func(t *testing.T, got T)) {
	root := f.TempDir()
	s := New(&system.System{Root: root})
	file := filepath.Join(root, path)
	for _, seed := range seeds {
		if err := save(s, seed); err != nil {
			f.Fatal(err)
		}
		data, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
		f.Add(data[:len(data)/2])
	}
	f.Add([]byte("null"))
	f.Fuzz(func(t *testing.T, data []byte) {
		root := t.TempDir()
		s, file := New(&system.System{Root: root}), filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := load(s)
		if err != nil {
			return
		}
		use(t, got)
		if err := save(s, got); err != nil {
			t.Fatalf("it was read but cannot be written: %v", err)
		}
		first, err := load(s)
		if err != nil {
			t.Fatalf("it was written but cannot be read: %v", err)
		}
		if err := save(s, first); err != nil {
			t.Fatal(err)
		}
		if again, err := load(s); err != nil || !reflect.DeepEqual(first, again) {
			t.Errorf("%v\n%+v\nbecomes\n%+v", err, first, again)
		}
	})
}

// useState uses a state as every run does.
func useState(t *testing.T, st State) {
	t.Helper()
	if err := st.Ruleset.Check(); err != nil {
		t.Errorf("it was read, but its rules are invalid: %v", err)
	}
	m := firewall.Moment{Time: time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC), Boot: "b", Uptime: time.Minute}
	if err := st.At(m).Ruleset.Check(); err != nil {
		t.Errorf("without expired rules it is invalid: %v", err)
	}
	st.Desired.Ends(m)
	if rules, err := firewall.Compile(st.Desired); err == nil {
		if err := rules.Check(); err != nil {
			t.Errorf("compiled again, it is invalid: %v", err)
		}
	}
}

func FuzzState(f *testing.F) {
	fuzz(f, StateFile, written(f), (*Store).Load, (*Store).Save, useState)
}

func FuzzPending(f *testing.F) {
	var seeds []Pending
	for _, st := range written(f) {
		seeds = append(seeds, Pending{State: st, Window: firewall.NewWindow(firewall.Moment{Time: time.Now(), Boot: "b", Uptime: time.Hour}, time.Minute)})
	}
	fuzz(f, PendingFile, seeds, (*Store).LoadPending, (*Store).SavePending, func(t *testing.T, p Pending) {
		useState(t, p.State)
		m := firewall.Moment{Time: time.Now(), Boot: "b", Uptime: time.Hour}
		p.Window.Over(m)
		p.Window.End(m)
	})
}

func FuzzBackup(f *testing.F) {
	before := backend.FamilyBackup{Input: "ACCEPT", Output: "ACCEPT", Removed: []string{"-p tcp -m tcp --dport 22 -j ACCEPT"}, Places: []int{0}}
	seed := Backup{
		Files:     []files.File{{Path: "/etc/sysconfig/iptables", Existed: true, Mode: 0o600, Data: []byte("*filter\nCOMMIT\n")}, {Path: "/etc/motd.d/basicfw"}},
		Dirs:      []string{"/etc/motd.d"},
		Conntrack: host.Conntrack{Max: 4096, Buckets: 1024},
		Conflicts: []firewall.ConflictBackup{{Name: "ufw", Units: []firewall.UnitBackup{{Name: "ufw.service", Enabled: true, Active: true}}}},
	}
	seed.Rules.IPv4, seed.Rules.IPv6 = before, before
	fuzz(f, original, []Backup{seed}, (*Store).LoadBackup, (*Store).SaveBackup, func(t *testing.T, o Backup) { o.File("/etc/sysconfig/iptables") })
}
