package bootstrap

import (
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/host"
	"github.com/basicfw/basicfw-agent/agent/iptables"
	"github.com/basicfw/basicfw-agent/agent/settings"
	"github.com/basicfw/basicfw-agent/agent/system"
	"github.com/basicfw/basicfw-agent/profiles"
)

// restoreLine matches the only lines allowed for iptables-restore: the table, a
// chain, COMMIT, or a rule whose words need no quotes, except for our log prefix.
var restoreLine = regexp.MustCompile(`^(\*filter|\*mangle|COMMIT|:[A-Za-z0-9-]{1,28} (DROP|ACCEPT|-) \[0:0\]|` +
	`-A (INPUT|FORWARD|BASICFW-[A-Za-z0-9-]{1,20})( [A-Za-z0-9_.,:/+!@-]+)+( --log-prefix "basicfw drop: " --log-level 7)?)$`)

// Whatever the settings contain, each line for iptables-restore has that form, and
// each jump goes to a chain that the text declares or to a known target.
func FuzzRestoreFile(f *testing.F) {
	f.Add("[agent]\nprofile = web+mail\n[ssh]\nclient_ip = 203.0.113.9, 2001:db8::/64\n[open]\ndb = 5432/tcp on private from 10.0.0.0/8, 192.168.0.0/16\n",
		"[profile]\nname = mine\nextends = web-only\n[open]\nmedia = 40000-40100/udp on eth0\n")
	f.Add("[interfaces]\ntrusted = wg0, tun*\n[ssh]\nallow = any\nlimit = 10/hour\nports = 22, 2222\n[log]\ndrops = no\n", "[profile]\nname = mine\nping = no\n")
	f.Add("[agent]\nprofile = mine\n[interfaces]\ntrusted = eth0 -j ACCEPT\n", "[profile]\nname = mine\n[open]\nx\ny = 80/tcp on \"eth0\n-A INPUT -j ACCEPT\"\n")
	f.Fuzz(func(t *testing.T, ini, profile string) {
		sys := &system.System{Root: t.TempDir()}
		for path, text := range map[string]string{settings.DefaultFile: ini, profiles.Dir + "/mine.ini": profile} {
			p := filepath.Join(sys.Root, path)
			if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		s, err := settings.Load(sys, "")
		if err != nil {
			return
		}
		set, err := profiles.Load(sys)
		if err != nil {
			return
		}
		st, _, err := Decide(Input{Settings: s, Profiles: set, Facts: host.Facts{SSHPorts: []uint16{22}},
			CheckClient: func(netip.Prefix) (string, error) { return "", nil }})
		if err != nil {
			return
		}
		for _, family := range firewall.Families {
			text := iptables.Render(st.Ruleset, family)
			known := map[string]bool{"ACCEPT": true, "DROP": true, "LOG": true, "RETURN": true}
			for _, line := range strings.Split(strings.TrimSuffix(text, "\n"), "\n") {
				if !restoreLine.MatchString(line) {
					t.Errorf("%v: %q", family, line)
				}
				words := strings.Fields(line)
				if strings.HasPrefix(line, ":") {
					known[words[0][1:]] = true
				}
				for i, w := range words {
					if w == "-j" && !known[words[i+1]] {
						t.Errorf("%v: %q jumps to an unknown target", family, line)
					}
				}
				if line == "-A INPUT -j ACCEPT" {
					t.Errorf("%v: %q", family, line)
				}
			}
		}
	})
}
