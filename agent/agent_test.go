package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/sirupsen/logrus"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/iptables"
	"github.com/basicfw/basicfw-agent/agent/nftables"
	"github.com/basicfw/basicfw-agent/agent/store"
	"github.com/basicfw/basicfw-agent/agent/system"
)

// fakeKernel holds a ruleset as a kernel would: it refuses what Check refuses,
// and it can be broken.
type fakeKernel struct {
	step    func(op, name string) error
	rules   firewall.Ruleset
	removed bool // others' deciding rules were taken out
	foreign []firewall.Foreign
	bypass  []firewall.Bypass
	loads   int
	yielded bool // INPUT's policy is ACCEPT
	open    bool // INPUT accepts all
}

func (k *fakeKernel) Inspect(_ context.Context, want firewall.Ruleset) (firewall.Inspection, error) {
	in := firewall.Inspection{Backend: "fake", Present: !k.rules.IsZero(), Snapshot: k.rules, Bypass: k.bypass}
	if k.open {
		in.Open = []firewall.Finding{{Family: firewall.IPv4, Why: "INPUT's policy is ACCEPT"}}
	}
	for _, f := range firewall.Families {
		*in.Before.Family(f) = firewall.FamilyBefore{Input: "ACCEPT", Output: "ACCEPT"}
	}
	if !k.removed {
		in.Foreign = k.foreign
		for _, fo := range k.foreign {
			in.Before.IPv4.Removed = append(in.Before.IPv4.Removed, fo.Rule)
		}
	}
	if !k.rules.Equal(want) {
		in.Drift = []firewall.Drift{{Family: "ipv4", Chain: firewall.InputChain, Kind: firewall.Altered, Want: "this", Got: "that"}}
		if k.rules.IsZero() {
			in.Drift, in.Flushed = nil, firewall.Families[:]
			for _, f := range firewall.Families {
				in.Drift = append(in.Drift, firewall.Drift{Family: f.String(), Chain: "INPUT", Kind: firewall.Missing, Want: "-j BASICFW-INPUT"})
				for _, c := range want.Chains(f) {
					for _, r := range c.Rules {
						in.Drift = append(in.Drift, firewall.Drift{Family: f.String(), Chain: c.Name, Kind: firewall.Missing, Want: r.Target})
					}
				}
			}
		}
	}
	return in, nil
}

func (k *fakeKernel) Load(_ context.Context, want firewall.Ruleset, _ firewall.Inspection, clear bool) error {
	if err := want.Check(); err != nil {
		return err
	}
	if err := k.step("load", ""); err != nil {
		return err
	}
	k.rules, k.removed, k.yielded = want, k.removed || clear, false
	k.loads++
	return nil
}

func (k *fakeKernel) LoadFiles(_ context.Context, files map[firewall.Family][]byte, _ firewall.Inspection) error {
	if !strings.Contains(string(files[firewall.IPv4]), firewall.InputChain) {
		return errors.New("the persisted files have no rules of ours")
	}
	k.loads++
	return nil
}

func (k *fakeKernel) Yield(context.Context) error {
	if err := k.step("yield", ""); err != nil {
		return err
	}
	k.yielded = true
	return nil
}

func (k *fakeKernel) Revert(_ context.Context, was firewall.Inspection, _ firewall.Before) error {
	k.rules, k.removed, k.yielded = was.Snapshot.(firewall.Ruleset), false, false
	return nil
}

func (k *fakeKernel) Remove(context.Context, firewall.Before) error {
	k.rules, k.removed = firewall.Ruleset{}, false
	return nil
}

type fakeService struct {
	step  func(op, name string) error
	there bool
}

func (s *fakeService) Install() error {
	if err := s.step("service", "install"); err != nil {
		return err
	}
	s.there = true
	return nil
}
func (s *fakeService) Start() error     { return s.step("service", "start") }
func (s *fakeService) Uninstall() error { s.there = false; return nil }
func (s *fakeService) Status() (ServiceStatus, error) {
	return ServiceStatus{Registered: s.there, Enabled: s.there, Active: s.there}, nil
}

type fakeConntrack struct{}

func (fakeConntrack) Grow(context.Context) (store.Conntrack, error) {
	return store.Conntrack{Max: 4096, Buckets: 1024}, nil
}
func (fakeConntrack) Set(store.Conntrack) error { return nil }
func (fakeConntrack) Adopt() (int, error)       { return 0, nil }

type bench struct {
	agent   *Agent
	kernel  *fakeKernel
	service *fakeService
	others  *fakeManagers
	guard   *fakeGuard
	root    string
	steps   []string
	fail    int // the step that fails, from 1; 0 is none
}

func newBench(t testing.TB) *bench {
	t.Helper()
	b := &bench{root: t.TempDir()}
	step := func(op, name string) error {
		b.steps = append(b.steps, op+" "+name)
		if len(b.steps) == b.fail {
			return fmt.Errorf("step %d, %s %s: %w", b.fail, op, name, fs.ErrPermission)
		}
		return nil
	}
	for _, dir := range []string{"etc/sysconfig", "var/lib", "run"} {
		if err := os.MkdirAll(filepath.Join(b.root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	sys := &system.System{Root: b.root, Step: system.Before(step)}
	log := logrus.New()
	log.SetOutput(io.Discard)
	b.kernel, b.service = &fakeKernel{step: step}, &fakeService{step: step}
	b.others, b.guard = &fakeManagers{bench: b, step: step, up: map[string]bool{}}, &fakeGuard{step: step}
	b.agent = &Agent{System: sys, Kernel: func(string) Kernel { return b.kernel }, Rules: iptables.Files{}, Table: nftables.Files{}, Store: store.New(sys), Service: b.service,
		Conntrack: fakeConntrack{}, Managers: b.others, Guard: b.guard, Log: log, Version: "1.0", Families: firewall.Families[:], Now: time.Now,
		Boot: func() (string, time.Duration, error) { return "", 0, nil }}
	return b
}

// files is everything below the root, by path.
func (b *bench) files(t *testing.T) map[string]string {
	t.Helper()
	out := map[string]string{}
	err := filepath.WalkDir(b.root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		info, _ := d.Info()
		out[strings.TrimPrefix(path, b.root)] = info.Mode().String() + " " + string(data)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func (b *bench) write(t testing.TB, path, data string) {
	t.Helper()
	p := filepath.Join(b.root, path)
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(p, []byte(data), 0o644); err != nil {
		t.Fatal(err)
	}
}

func decided(t testing.TB, client string) store.State {
	t.Helper()
	st := store.State{Profile: store.Choice{Name: "web-only"}, Service: true}
	st.Desired = firewall.Desired{
		Profile: firewall.Profile{Name: "web-only", Services: []firewall.Service{
			{Name: "http", Proto: firewall.TCP, Ports: firewall.Port(80), On: "any"}}},
		SSH: firewall.SSH{Ports: []uint16{22}, Mode: firewall.SSHPinned, Allow: []netip.Prefix{netip.MustParsePrefix(client)}},
	}
	var err error
	if st.Ruleset, err = firewall.Compile(st.Desired); err != nil {
		t.Fatal(err)
	}
	return st
}

func options() Options {
	return Options{Clear: true, Service: true, Record: []string{"/etc/basicfw/local.ini"}, Files: []Change{{Path: "/etc/basicfw/local.ini", Data: []byte("[ssh]\n"), Mode: 0o600}}}
}

func noPorts() ([]uint16, []string, bool, error) {
	return []uint16{22}, []string{"22: test"}, true, nil
}

// Every step of a first bootstrap, and of a later change, fails once; each time
// rules, files and service are as they were.
func TestConvergeAllOrNothing(t *testing.T) {
	stock := "*filter\n:INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n-A INPUT -j REJECT\nCOMMIT\n"
	for _, later := range []bool{false, true} {
		for n, done := 1, false; !done; n++ {
			b := newBench(t)
			b.write(t, "/etc/sysconfig/iptables", stock)
			b.kernel.foreign = []firewall.Foreign{{Family: "ipv4", Chain: "INPUT", Rule: "-j REJECT"}}
			next := decided(t, "203.0.113.9/32")
			o := options()
			if later {
				if _, err := b.agent.Converge(context.Background(), next, o); err != nil {
					t.Fatal(err)
				}
				next = decided(t, "198.51.100.7/32")
				o.Clear = false
				o.Files[0].Data = []byte("[ssh]\nallow = any\n")
			}
			before, rules, service := b.files(t), b.kernel.rules, b.service.there
			b.steps, b.fail = nil, n
			out, err := b.agent.Converge(context.Background(), next, o)
			if len(b.steps) < n {
				done = true
				if err != nil || !out.Changed {
					t.Fatalf("nothing was broken, but: %v, changed %v", err, out.Changed)
				}
				if !later && n < 12 {
					t.Errorf("only %d steps were walked through", n)
				}
				break
			}
			if !errors.Is(err, fs.ErrPermission) {
				t.Fatalf("later %v, %s: %v", later, b.steps[n-1], err)
			}
			if diff := cmp.Diff(before, b.files(t)); diff != "" {
				t.Errorf("later %v, %s failed: files differ (-before +after):\n%s", later, b.steps[n-1], diff)
			}
			if !b.kernel.rules.Equal(rules) {
				t.Errorf("later %v, %s failed: the rules are others", later, b.steps[n-1])
			}
			if b.service.there != service {
				t.Errorf("later %v, %s failed: service registered: %v, was %v", later, b.steps[n-1], b.service.there, service)
			}
		}
	}
}

func TestConvergeTwice(t *testing.T) {
	b := newBench(t)
	next := decided(t, "203.0.113.9/32")
	for i := range 2 {
		before := b.files(t)
		b.steps = nil
		out, err := b.agent.Converge(context.Background(), next, options())
		if err != nil {
			t.Fatal(err)
		}
		if i == 1 && (out.Changed || len(b.steps) > 0) {
			t.Errorf("the second time changes: %v", b.steps)
			t.Error(cmp.Diff(before, b.files(t)))
		}
	}
}

func TestUninstall(t *testing.T) {
	b := newBench(t)
	b.write(t, "/etc/sysconfig/iptables", "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -p tcp --dport 22 -j ACCEPT\nCOMMIT\n# the end\n")
	before := b.files(t)
	if _, err := b.agent.Converge(context.Background(), decided(t, "203.0.113.9/32"), options()); err != nil {
		t.Fatal(err)
	}
	if err := b.agent.Uninstall(context.Background()); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(before, b.files(t)); diff != "" {
		t.Errorf("not as it was (-before +after):\n%s", diff)
	}
	if !b.kernel.rules.IsZero() || b.service.there {
		t.Error("rules or service are still there")
	}
	if err := b.agent.Uninstall(context.Background()); !errors.Is(err, store.ErrNone) {
		t.Errorf("a second time: %v", err)
	}
}

func TestVerifyNamesAndMends(t *testing.T) {
	b := newBench(t)
	st := decided(t, "203.0.113.9/32")
	if _, err := b.agent.Converge(context.Background(), st, options()); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name, want string
		spoil      func()
	}{
		{"rules", firewall.InputChain, func() { b.kernel.rules.IPv4 = b.kernel.rules.IPv4[:1:1] }},
		{"file altered", "/etc/sysconfig/iptables: altered: -A BASICFW-INPUT -i eth0", func() {
			p := filepath.Join(b.root, "/etc/sysconfig/iptables")
			data, _ := os.ReadFile(p)
			os.WriteFile(p, []byte(strings.Replace(string(data), "-i lo", "-i eth0", 1)), 0o600)
		}},
		{"file gone", "/etc/sysconfig/ip6tables: missing", func() { os.Remove(filepath.Join(b.root, "/etc/sysconfig/ip6tables")) }},
		{"mode", "mode 0644", func() { os.Chmod(filepath.Join(b.root, "/etc/sysconfig/iptables"), 0o644) }},
		{"service", "registered", func() { b.service.there = false }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.spoil()
			r, err := b.agent.Verify(context.Background(), noPorts)
			if err != nil || len(r.Drift) == 0 {
				t.Fatalf("drift %v, %v", r.Drift, err)
			}
			if !strings.Contains(fmt.Sprint(r.Drift), tt.want) {
				t.Errorf("%v does not name %q", r.Drift, tt.want)
			}
			if _, err := b.agent.Mend(context.Background(), r); err != nil {
				t.Fatal(err)
			}
			if r, err = b.agent.Verify(context.Background(), noPorts); err != nil || len(r.Drift) > 0 {
				t.Errorf("after the repair: %v, %v", r.Drift, err)
			}
		})
	}
}

// sshd moved: its port is wanted from then on. At boot, where only its
// configuration speaks, the former port stays too.
func TestVerifyFollowsSSHD(t *testing.T) {
	b := newBench(t)
	if _, err := b.agent.Converge(context.Background(), decided(t, "203.0.113.9/32"), options()); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		live bool
		want []uint16
	}{{true, []uint16{2222}}, {false, []uint16{22, 2222}}} {
		r, err := b.agent.Verify(context.Background(), func() ([]uint16, []string, bool, error) {
			return []uint16{2222}, []string{"2222: sshd"}, tt.live, nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(tt.want, r.State.Desired.SSH.Ports); diff != "" {
			t.Errorf("live %v: %s", tt.live, diff)
		}
	}
}

func TestRunFallsBack(t *testing.T) {
	for _, tt := range []struct {
		name  string
		spoil func(b *bench)
		want  string
		state string
	}{
		{"whole", func(*bench) {}, "protected", Protected},
		{"state unreadable", func(b *bench) { os.WriteFile(filepath.Join(b.root, store.Dir, "state.json"), []byte("{"), 0o600) }, "closed by the persisted files", Drifted},
		{"state of a newer version", func(b *bench) {
			os.WriteFile(filepath.Join(b.root, store.Dir, "state.json"), []byte(`{"schema": 99, "version": "9"}`), 0o600)
		}, "closed by the persisted files", Drifted},
		{"state of another user's", func(b *bench) { os.Chmod(filepath.Join(b.root, store.Dir, "state.json"), 0o666) }, "closed by the persisted files", Drifted},
		{"nothing left", func(b *bench) {
			os.Remove(filepath.Join(b.root, store.Dir, "state.json"))
			os.Remove(filepath.Join(b.root, "/etc/sysconfig/iptables"))
		}, "closed by the failsafe rules", FailsafeState},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newBench(t)
			if _, err := b.agent.Converge(context.Background(), decided(t, "203.0.113.9/32"), options()); err != nil {
				t.Fatal(err)
			}
			b.kernel.rules, b.kernel.loads = firewall.Ruleset{}, 0
			tt.spoil(b)
			ctx, cancel := context.WithCancel(context.Background())
			var ready string
			err := b.agent.Run(ctx, RunOptions{Ports: noPorts, Instance: func() string { return "" },
				Look:  func() ([]firewall.Interface, error) { return nil, nil },
				Facts: func() Facts { return Facts{SSHPorts: []uint16{22}} }, Every: time.Hour, Changed: func() {},
				Ready: func(s string) { ready = s; cancel() }})
			if err != nil || !strings.Contains(ready, tt.want) || b.kernel.loads == 0 {
				t.Errorf("ready %q, %v, %d loads", ready, err, b.kernel.loads)
			}
			data, err := os.ReadFile(filepath.Join(b.root, StatusFile))
			if err != nil || !strings.Contains(string(data), `"state": "`+tt.state+`"`) {
				t.Errorf("status.json, want state %s: %v\n%s", tt.state, err, data)
			}
		})
	}
}

// look is one look of a service that has just begun.
func look(a *Agent, o RunOptions) (bool, error) {
	return (&watcher{Agent: a, RunOptions: o}).look(context.Background())
}

// On a clone the pin to the first owner is loosened.
func TestLookLoosensClone(t *testing.T) {
	b := newBench(t)
	st := decided(t, "203.0.113.9/32")
	st.InstanceID = "i-1"
	if _, err := b.agent.Converge(context.Background(), st, options()); err != nil {
		t.Fatal(err)
	}
	o := RunOptions{Ports: noPorts, Look: func() ([]firewall.Interface, error) { return nil, nil }, Instance: func() string { return "i-1" }}
	if changed, err := look(b.agent, o); changed || err != nil {
		t.Errorf("the same instance: %v, %v", changed, err)
	}
	o.Instance = func() string { return "i-2" }
	if changed, err := look(b.agent, o); !changed || err != nil {
		t.Fatalf("another instance: %v, %v", changed, err)
	}
	got, err := b.agent.Store.Load()
	if err != nil || got.Desired.SSH.Mode != firewall.SSHLimited || got.Client.Source != "clone" {
		t.Errorf("%+v, %v", got.Desired.SSH, err)
	}
	if changed, err := look(b.agent, o); changed || err != nil {
		t.Errorf("a second look changes again: %v, %v", changed, err)
	}
}
