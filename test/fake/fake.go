// Package fake is a machine for tests: a temporary directory for its files, and values in
// place of its kernel, its service manager and its other firewalls. They refuse what the
// real ones refuse, and each of their steps can be made to fail.
package fake

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/basicfw/basicfw-agent/agent/apply"
	"github.com/basicfw/basicfw-agent/agent/backend"
	"github.com/basicfw/basicfw-agent/agent/files"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/host"
	"github.com/basicfw/basicfw-agent/agent/iptables"
	"github.com/basicfw/basicfw-agent/agent/nftables"
	"github.com/basicfw/basicfw-agent/agent/store"
	"github.com/basicfw/basicfw-agent/agent/system"
	"github.com/basicfw/basicfw-agent/agent/verify"
	"github.com/basicfw/basicfw-agent/test/lab"
)

// Step is called before each step that changes something; an error from it is that
// step's error.
type Step func(op, name string) error

// Machine is a machine that the Applier changes. The fakes have the names of the Applier's
// fields that they implement.
type Machine struct {
	verify.Verifier
	Kernel    *Kernel
	Service   *Service
	Conflicts *Conflicts
	Guard     *Guard

	Root  string   // the directory of its files
	Steps []string // the steps made or failed
	Fail  int      // the step that fails, from 1; 0 is none
	// Now is the machine's time. Without a time it is the real one.
	Now firewall.Moment
}

// New returns a machine on which nothing of ours is installed.
func New(t testing.TB) *Machine {
	t.Helper()
	m := &Machine{Root: t.TempDir()}
	for _, dir := range []string{"etc/sysconfig", "var/lib", "run"} {
		if err := os.MkdirAll(filepath.Join(m.Root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	m.Kernel, m.Service, m.Guard = &Kernel{Step: m.step}, &Service{Step: m.step}, &Guard{Step: m.step}
	m.Conflicts = &Conflicts{Step: m.step, kernel: m.Kernel, guard: m.Guard}
	sys := &system.System{Root: m.Root, Step: m.do}
	log := logrus.New()
	log.SetOutput(io.Discard)
	m.Verifier = verify.Verifier{Applier: &apply.Applier{
		System: sys, Backend: func(string) backend.Backend { return m.Kernel }, Store: store.New(sys),
		Files: apply.RulesFiles{System: sys, Iptables: iptables.Files{}, Nftables: nftables.Files{}, Families: firewall.Families[:]},
		Live:  m.Kernel.Live, Ports: NoPorts,
		Service: m.Service, Conntrack: Conntrack{}, Conflicts: m.Conflicts, Guard: m.Guard,
		Log: log, Version: "1.0", Families: firewall.Families[:], Moment: m.moment, OtherKernel: func() bool { return false },
	}}
	return m
}

// do makes a step of the system. Flushes to disk are skipped: they take most of the time,
// and only a power cut needs them.
func (m *Machine) do(op, name string, do func() error) error {
	if op == "flush" || op == "sync" {
		return m.step(op, name)
	}
	return lab.Before(m.step)(op, name, do)
}

func (m *Machine) step(op, name string) error {
	m.Steps = append(m.Steps, op+" "+name)
	if len(m.Steps) == m.Fail {
		return fmt.Errorf("step %d, %s %s: %w", m.Fail, op, name, fs.ErrPermission)
	}
	return nil
}

func (m *Machine) moment() firewall.Moment {
	now := m.Now
	if now.Time.IsZero() {
		now.Time = time.Now()
	}
	return now
}

// BreakFrom resets the record of steps and makes the nth step from now on fail.
func (m *Machine) BreakFrom(n int) { m.Steps, m.Fail = nil, n }

// SetLog makes the machine log to w.
func (m *Machine) SetLog(w io.Writer) {
	log := logrus.New()
	log.SetOutput(w)
	m.Log = log
}

// Path returns the real path of a file of the machine.
func (m *Machine) Path(path string) string { return filepath.Join(m.Root, path) }

// Contents returns everything below the root, by path: the mode, and the data.
func (m *Machine) Contents(t testing.TB) map[string]string {
	t.Helper()
	out := map[string]string{}
	err := filepath.WalkDir(m.Root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		info, _ := d.Info()
		out[strings.TrimPrefix(path, m.Root)] = info.Mode().String() + " " + string(data)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// Write writes a file as another program would.
func (m *Machine) Write(t testing.TB, path, data string) {
	t.Helper()
	p := m.Path(path)
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(p, []byte(data), 0o644); err != nil {
		t.Fatal(err)
	}
}

// Install applies a state as bootstrap does, and returns the result.
func (m *Machine) Install(t testing.TB, st store.State) store.State {
	t.Helper()
	out, err := m.Apply(context.Background(), st, Options())
	if err != nil {
		t.Fatal(err)
	}
	return out.State
}

// Decided returns a state that allows SSH from one client and opens port 80 to any address.
func Decided(t testing.TB, client string) store.State {
	t.Helper()
	st := store.State{Profile: store.Choice{Name: "web-only"}, Service: true, Named: &host.Naming{}}
	st.Desired = firewall.Desired{
		Published: firewall.PublishedLeave,
		Profile: firewall.Profile{Name: "web-only", Services: []firewall.Service{
			{Name: "http", Proto: firewall.TCP, Ports: firewall.Port(80), On: "any"}}},
		SSH: firewall.SSH{Ports: []uint16{22}, Mode: firewall.SSHPinned, Allow: []netip.Prefix{netip.MustParsePrefix(client)}},
	}
	return Compiled(t, st)
}

// Compiled returns a state with the rules of its Desired.
func Compiled(t testing.TB, st store.State) store.State {
	t.Helper()
	var err error
	if st.Ruleset, err = firewall.Compile(st.Desired); err != nil {
		t.Fatal(err)
	}
	return st
}

// LocalFile is the file of settings that Options writes.
const LocalFile = "/etc/basicfw/local.ini"

// Options returns the options of a bootstrap.
func Options() apply.Options {
	return apply.Options{Clear: true, Service: true, Record: []string{LocalFile},
		Files: []files.Change{{Path: LocalFile, Data: []byte("[ssh]\n"), Mode: 0o600}}}
}

// NoPorts returns the ports of an sshd that listens on port 22.
func NoPorts() ([]uint16, []string, bool, error) {
	return []uint16{22}, []string{"22: test"}, true, nil
}

// FuzzState seeds f with a valid state and an empty one, then calls check with the
// fuzzed bytes of the state file.
func FuzzState(f *testing.F, check func(t *testing.T, data string)) {
	m := New(f)
	if err := m.Store.Save(Decided(f, "192.0.2.9/32")); err != nil {
		f.Fatal(err)
	}
	data, err := os.ReadFile(m.Path(store.StateFile))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add([]byte("{}"))
	f.Fuzz(func(t *testing.T, data []byte) { check(t, string(data)) })
}
