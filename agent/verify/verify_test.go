package verify_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/basicfw/basicfw-agent/agent/apply"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/host"
	"github.com/basicfw/basicfw-agent/agent/store"
	"github.com/basicfw/basicfw-agent/test/fake"
)

func TestRepairFixesAllDrift(t *testing.T) {
	m := fake.New(t)
	m.Install(t, fake.Decided(t, "203.0.113.9/32"))
	path := m.Path("/etc/sysconfig/iptables")
	for _, tt := range []struct {
		name, want string
		spoil      func()
	}{
		{"rules", firewall.InputChain, func() { m.Kernel.Rules.IPv4 = m.Kernel.Rules.IPv4[:1:1] }},
		{"file altered", "/etc/sysconfig/iptables: altered: -A BASICFW-INPUT -i eth0", func() {
			data, _ := os.ReadFile(path)
			os.WriteFile(path, []byte(strings.Replace(string(data), "-i lo", "-i eth0", 1)), 0o600)
		}},
		{"file gone", "/etc/sysconfig/ip6tables: missing", func() { os.Remove(m.Path("/etc/sysconfig/ip6tables")) }},
		{"mode", "mode 0644", func() { os.Chmod(path, 0o644) }},
		{"service", "registered", func() { m.Service.Registered = false }},
		{"guard", apply.GuardTable, func() { m.Guard.Raised = true }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.spoil()
			r, err := m.Verify(context.Background(), fake.NoPorts)
			if err != nil || len(r.Drift) == 0 {
				t.Fatalf("drift %v, %v", r.Drift, err)
			}
			if !strings.Contains(fmt.Sprint(r.Drift), tt.want) {
				t.Errorf("drift %v, want %q", r.Drift, tt.want)
			}
			if _, err := m.Repair(context.Background(), r); err != nil {
				t.Fatal(err)
			}
			if r, err = m.Verify(context.Background(), fake.NoPorts); err != nil || len(r.Drift) > 0 {
				t.Errorf("after the repair: %v, %v", r.Drift, err)
			}
		})
	}
}

// After sshd moved, the desired state has its new port. At boot, when only its
// configuration is known, the previous port stays too.
func TestVerifyFollowsSSHD(t *testing.T) {
	m := fake.New(t)
	m.Install(t, fake.Decided(t, "203.0.113.9/32"))
	for _, tt := range []struct {
		live bool
		want []uint16
	}{{true, []uint16{2222}}, {false, []uint16{22, 2222}}} {
		r, err := m.Verify(context.Background(), func() ([]uint16, []string, bool, error) {
			return []uint16{2222}, []string{"2222: sshd"}, tt.live, nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(tt.want, r.State.Desired.SSH.Ports); diff != "" || !r.Moved {
			t.Errorf("live %v: moved %v: %s", tt.live, r.Moved, diff)
		}
	}
}

// TestVerifyKeepsThePortOfASession checks that a port that an SSH session came in by stays
// while sshd listens on others, and without the default if there is no sshd.
func TestVerifyKeepsThePortOfASession(t *testing.T) {
	for _, tt := range []struct {
		port uint16
		why  string
		live bool
		want []uint16
	}{
		{22, "sshd listens on it", true, []uint16{22, 2222}},
		{22, "/etc/ssh/sshd_config:1", false, []uint16{22, 2222}},
		{22, host.NoSSHD, false, []uint16{2222}},
	} {
		m := fake.New(t)
		st := fake.Decided(t, "203.0.113.9/32")
		st.Desired.SSH.Ports, st.SSHPorts = []uint16{2222}, []string{host.SessionPort}
		m.Install(t, st)
		r, err := m.Verify(context.Background(), func() ([]uint16, []string, bool, error) { return []uint16{tt.port}, []string{tt.why}, tt.live, nil })
		if diff := cmp.Diff(tt.want, r.State.Desired.SSH.Ports); err != nil || diff != "" {
			t.Errorf("%q: %v: %s", tt.why, err, diff)
		}
	}
}

// Ports stay if the settings name them or sshd's cannot be found.
func TestVerifyKeepsFixedPorts(t *testing.T) {
	for _, tt := range []struct {
		name  string
		fixed bool
		ports []uint16
		err   error
	}{{"fixed", true, []uint16{2222}, nil}, {"none found", false, nil, nil}, {"an error", false, []uint16{2222}, errors.New("no sshd")}} {
		m := fake.New(t)
		st := fake.Decided(t, "203.0.113.9/32")
		st.SSHFixed = tt.fixed
		m.Install(t, st)
		r, err := m.Verify(context.Background(), func() ([]uint16, []string, bool, error) { return tt.ports, []string{"test"}, true, tt.err })
		if err != nil || r.Moved || len(r.Drift)+len(r.Warnings) > 0 {
			t.Errorf("%s: moved %v, %v, %q, %v", tt.name, r.Moved, r.Drift, r.Warnings, err)
		}
	}
}

// While a change is pending, the kernel should have its rules and the files those of the
// state. A repair keeps it so.
func TestVerifyWantsThePendingRules(t *testing.T) {
	m := fake.New(t)
	m.Install(t, fake.Decided(t, "203.0.113.9/32"))
	next := fake.Decided(t, "198.51.100.7/32")
	if _, err := m.Try(context.Background(), next, time.Hour, apply.Options{}); err != nil {
		t.Fatal(err)
	}
	before := m.Contents(t)
	for _, flushed := range []bool{false, true, false} {
		if flushed {
			m.Kernel.Rules = firewall.Ruleset{}
		}
		r, err := m.Verify(context.Background(), fake.NoPorts)
		if err != nil || flushed != (len(r.Drift) > 0) || len(r.Files) > 0 || !r.Wanted().Ruleset.Equal(next.Ruleset) {
			t.Fatalf("flushed %v: %v, %v", flushed, r.Drift, err)
		}
		if flushed {
			if _, err := m.Repair(context.Background(), r); err != nil {
				t.Fatal(err)
			}
		}
	}
	if diff := cmp.Diff(before, m.Contents(t)); diff != "" || !m.Kernel.Rules.Equal(next.Ruleset) {
		t.Errorf("the repair changes more than the rules: %s", diff)
	}
}

// FuzzState verifies and repairs a machine with any text as its state.
func FuzzState(f *testing.F) {
	fake.FuzzState(f, func(t *testing.T, data string) {
		m := fake.New(t)
		m.Write(t, store.StateFile, data)
		r, err := m.Verify(context.Background(), fake.NoPorts)
		if _, unusable := m.Store.Load(); err != nil && unusable == nil {
			t.Errorf("verify: %v", err)
		}
		if err == nil {
			m.Repair(context.Background(), r)
		}
	})
}
