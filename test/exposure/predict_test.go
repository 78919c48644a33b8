package exposure_test

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/basicfw/basicfw-agent/agent/backend"
	"github.com/basicfw/basicfw-agent/agent/exposure"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/iptables"
	"github.com/basicfw/basicfw-agent/agent/nftables"
	"github.com/basicfw/basicfw-agent/agent/survey"
	"github.com/basicfw/basicfw-agent/agent/system"
	"github.com/basicfw/basicfw-agent/test/fake"
	"github.com/basicfw/basicfw-agent/test/lab"
)

// predictEnv makes TestPredictInNamespace load rules with the backends that it names.
const predictEnv = "BASICFW_TEST_PREDICT"

// TestPredict compares what packets reach by the predicted rules of all programs, and by
// those that are live after the load.
func TestPredict(t *testing.T) {
	lab.Need(t, "unshare", "mount", "nft", "xtables-nft-multi", "xtables-legacy-multi")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	const closing = "$i -N LOGDROP; $i -A LOGDROP -j DROP; $i -A INPUT -i lo -j ACCEPT; $i -A INPUT -p tcp --dport 8080 -j ACCEPT; $i -A INPUT -i eth9 -j LOGDROP; $i -A INPUT -j LOGDROP"
	for _, tt := range []struct{ name, script string }{
		{"nothing", ""},
		{"a chain that closes", closing},
		{"a policy", "$i -P INPUT DROP; $i -A INPUT -p tcp --dport 22 -j ACCEPT"},
		{"a chain that accepts", "$i -N OTHER; $i -A OTHER -p tcp --dport 9999 -j ACCEPT; $i -A INPUT -j OTHER"},
		{"a redirect", "$i -t nat -A PREROUTING -p tcp --dport 9999 -j REDIRECT --to-ports 443; $i -t mangle -A INPUT -p tcp --dport 80 -j DROP"},
		{"native rules", "nft 'add table inet other; add chain inet other in { type filter hook input priority 10; policy drop; }; add rule inet other in tcp dport 22 accept'"},
	} {
		for _, variant := range []string{"nft", "legacy"} {
			for _, steps := range []string{"iptables", "nftables", "iptables clear", "nftables clear", "iptables,nftables", "nftables,iptables"} {
				t.Run(tt.name+"/"+variant+"/"+steps, func(t *testing.T) {
					t.Parallel()
					bin := t.TempDir()
					multi, err := exec.LookPath("xtables-" + variant + "-multi")
					if err != nil {
						t.Fatal(err)
					}
					for _, name := range strings.Fields("iptables iptables-save iptables-restore ip6tables ip6tables-save ip6tables-restore") {
						if err := os.Symlink(multi, filepath.Join(bin, name)); err != nil {
							t.Fatal(err)
						}
					}
					script := "mount --bind $BIN /usr/local/sbin; mount -t tmpfs none /run; for i in iptables ip6tables; do " + tt.script + "\ntrue; done; exec \"$0\" -test.run '^TestPredictInNamespace$'"
					cmd := exec.Command("unshare", "-mn", "sh", "-ec", script, self)
					cmd.Env = append(os.Environ(), predictEnv+"="+steps, "BIN="+bin)
					if out, err := cmd.CombinedOutput(); err != nil {
						t.Fatalf("%v: %s", err, out)
					}
				})
			}
		}
	}
}

// TestPredictInNamespace is the part of TestPredict that runs in its namespace. By itself it
// does nothing.
func TestPredictInNamespace(t *testing.T) {
	if os.Getenv(predictEnv) == "" {
		return
	}
	ctx, sys := context.Background(), &system.System{}
	for _, step := range strings.Split(os.Getenv(predictEnv), ",") {
		kernel := iptables.New(sys, firewall.Families[:])
		engines := backend.Engines{Iptables: kernel, Beside: iptables.Beside{Backend: kernel}, Nftables: nftables.New(sys, firewall.Families[:]),
			Leftover: nftables.Leftover{System: sys}, HasPrograms: kernel.There, InUse: func() bool { return kernel.LegacyInUse() || nftables.Xtables() }}
		live := func() exposure.Ruleset {
			rules, err := survey.Live(kernel)(ctx)
			if err != nil {
				t.Fatal(err)
			}
			return rules
		}
		name, clear := strings.CutSuffix(step, " clear")
		want := fake.Decided(t, "203.0.113.9/32").Ruleset
		in, err := engines.For(name).Inspect(ctx, want)
		if err != nil {
			t.Fatal(err)
		}
		before := live()
		predicted := reached(in.Snapshot.Predict(ctx, before, iptables.Model(want), clear))
		if err := in.Snapshot.Load(ctx, want, clear); err != nil {
			t.Fatal(err)
		}
		loaded := reached(live())
		if predicted != loaded {
			t.Errorf("%s: predicted\n%sloaded\n%sbefore\n%s", step, predicted, loaded, reached(before))
		}
		if loaded == reached(before) && !strings.Contains(os.Getenv(predictEnv), ",") {
			t.Errorf("%s changed nothing", step)
		}
	}
}

// reached returns from where packets reach ports.
func reached(r exposure.Ruleset) string {
	var b strings.Builder
	for _, dst := range []string{"192.0.2.1", "2001:db8::1"} {
		for _, port := range []uint16{22, 25, 80, 443, 8080, 9999} {
			a := netip.MustParseAddr(dst)
			p := exposure.Packet{Family: firewall.IPv4, In: "eth0", Dst: a, DstType: "LOCAL", Proto: 6, DstPort: port, TCPFlags: 2}
			if a.Is6() {
				p.Family = firewall.IPv6
			}
			sure, perhaps := r.Trace(p, exposure.All(a), exposure.Host{Type: func(netip.Addr) string { return "LOCAL" }}, false).Open()
			fmt.Fprintln(&b, dst, port, sure.Networks(), perhaps.Networks())
		}
	}
	return b.String()
}
