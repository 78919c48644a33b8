package iptables

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/basicfw/basicfw-agent/agent/exposure"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/system"
	"github.com/basicfw/basicfw-agent/test/lab"
)

// liveEnv makes this test binary print what Live returns.
const liveEnv = "BASICFW_TEST_LIVE"

// liveText returns what Live returns: the rules, the names of tables and the error.
func liveText(tables []exposure.Table, err error) string {
	var b strings.Builder
	for _, t := range tables {
		for _, c := range t.Chains {
			for _, r := range c.Rules {
				b.WriteString(t.Program + " " + t.Family + " " + t.Name + " " + c.Name + " " + r.Text + "\n")
			}
		}
	}
	if err != nil {
		b.WriteString("error: " + err.Error() + "\n")
	}
	return b.String()
}

// TestLivePrint is the part of TestLive that runs in its namespace. By itself it does nothing.
func TestLivePrint(t *testing.T) {
	if os.Getenv(liveEnv) == "" {
		return
	}
	tables, err := New(&system.System{}, firewall.Families[:]).Live(context.Background())
	if err := os.WriteFile(os.Getenv(liveEnv), []byte(liveText(tables, err)), 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestLive reads the rules of the real programs, in a namespace of its own.
func TestLive(t *testing.T) {
	lab.Need(t, "unshare", "iptables-nft", "iptables-legacy", "ip6tables-nft", "nft")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	line, err := exec.Command("iptables", "--version").Output()
	if err != nil || !parseTools(string(line)).nft {
		lab.Skip(t, "the nft variant as iptables")
	}
	for _, tt := range []struct{ name, script, want string }{
		{"nothing", "true", ""},
		{"nft", "iptables-nft -A INPUT -p tcp --dport 80 -j DROP; ip6tables-nft -t raw -A PREROUTING -j ACCEPT",
			"iptables ip filter INPUT -p tcp -m tcp --dport 80 -j DROP\niptables ip6 raw PREROUTING -j ACCEPT\n"},
		{"both", "iptables-nft -A INPUT -j DROP; iptables-legacy -t nat -A PREROUTING -p tcp -j REDIRECT",
			"iptables ip filter INPUT -j DROP\niptables-legacy ip nat PREROUTING -p tcp -j REDIRECT\n"},
		{"legacy alone", "ip6tables-legacy -A INPUT -j DROP", "iptables-legacy ip6 filter INPUT -j DROP\n"},
		{"an incompatible table", "nft add table ip filter; nft 'add chain ip filter FORWARD { type filter hook forward priority 0; }'; " +
			"nft add rule ip filter FORWARD ct state invalid drop; iptables-nft -t nat -A PREROUTING -j ACCEPT", "iptables ip nat PREROUTING -j ACCEPT\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "out")
			cmd := exec.Command("unshare", "-mn", "sh", "-ec", tt.script+"\nexec \"$0\" -test.run '^TestLivePrint$'", self)
			cmd.Env = append(os.Environ(), liveEnv+"="+file)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			if got, err := os.ReadFile(file); err != nil || string(got) != tt.want {
				t.Errorf("got %s%v, want %s", got, err, tt.want)
			}
		})
	}
}

// TestLiveFakes reads the rules with the fake programs.
func TestLiveFakes(t *testing.T) {
	for _, tt := range []struct {
		fake    fake
		program string
	}{
		{fake{Version: "1.4.21"}, "iptables-legacy"},
		{fake{Version: "1.8.4", Waits: true}, "iptables-legacy"},
		{fake{Version: "1.8.4", NFT: true}, "iptables"},
		{fake{Version: "1.8.13", NFT: true}, "iptables"},
	} {
		m := newMachine(t, tt.fake)
		m.has(firewall.IPv4, "-A INPUT -j DROP")
		want := tt.program + " ip filter INPUT -j DROP\n"
		if got := liveText(m.Live(context.Background())); got != want {
			t.Errorf("%+v: got %s, want %s", tt.fake, got, want)
		}
	}
}

// TestLiveMissing checks the error without iptables.
func TestLiveMissing(t *testing.T) {
	tables, err := New(&system.System{Root: t.TempDir(), Programs: []string{t.TempDir()}}, firewall.Families[:]).Live(context.Background())
	var missing *MissingError
	if !errors.As(err, &missing) || len(tables) > 0 {
		t.Errorf("got %v, %v; want a *MissingError", tables, err)
	}
}
