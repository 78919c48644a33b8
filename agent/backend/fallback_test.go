package backend

import (
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/system"
)

type lockHeld struct{}

func (lockHeld) Error() string   { return "the xtables lock is held" }
func (lockHeld) Temporary() bool { return true }

// Only a backend that was detected and does not work is replaced.
func TestFallback(t *testing.T) {
	refused := &Error{fmt.Errorf("loading the ipv4 rules: line 3 failed")}
	for _, tt := range []struct {
		what     string
		name     string
		detected bool
		err      error
		reason   string // of nftables; "" is no fallback
	}{
		{"the kernel refuses iptables' rules", Iptables, true, refused, "iptables does not work here: loading the ipv4 rules: line 3 failed"},
		{"iptables is missing", Iptables, true, &Error{&system.NotFoundError{Name: "iptables-save"}}, "iptables-save is not installed"},
		{"the administrator chose iptables", Iptables, false, refused, ""},
		{"the kernel refuses nftables' rules", Nftables, true, refused, ""},
		{"the failure is temporary", Iptables, true, &Error{fmt.Errorf("loading: %w", lockHeld{})}, ""},
		{"no process is free", Iptables, true, &Error{fmt.Errorf("loading: %w", syscall.EAGAIN)}, ""},
		{"the kernel spells a rule differently", Iptables, true, &Error{&MismatchError{firewall.Drift{Chain: "INPUT", Kind: firewall.Altered}}}, ""},
		{"something else fails", Iptables, true, errors.New("the disk is full"), ""},
		{"nothing fails", Iptables, true, nil, ""},
	} {
		c, ok := Fallback(Choice{Name: tt.name}, tt.detected, tt.err)
		if ok != (tt.reason != "") || ok && (c.Name != Nftables || c.Reason != tt.reason) || !ok && c.Name != tt.name {
			t.Errorf("%s: %v %+v", tt.what, ok, c)
		}
	}
}

// If both fail, the first backend stays chosen and both errors are reported.
func TestWithFallback(t *testing.T) {
	var tried []string
	c, err := WithFallback(Choice{Name: Iptables}, true, func(Choice) {}, func(c Choice) error {
		tried = append(tried, c.Name)
		return &Error{errors.New(c.Name + " is broken")}
	})
	if c.Name != Iptables || err == nil || !strings.Contains(err.Error(), "iptables is broken") || !strings.Contains(err.Error(), "nftables is broken") || len(tried) != 2 {
		t.Errorf("%+v, %v, tried %q", c, err, tried)
	}
	c, err = WithFallback(Choice{Name: Iptables}, true, func(Choice) {}, func(c Choice) error {
		if c.Name == Iptables {
			return &Error{errors.New("broken")}
		}
		return nil
	})
	if c.Name != Nftables || err != nil {
		t.Errorf("%+v, %v", c, err)
	}
}
