package iptables

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// held returns the rules of a web and mail server that holds published ports to its profile.
func held(t *testing.T) firewall.Ruleset {
	t.Helper()
	d := webMail()
	d.Published = firewall.PublishedProfile
	r, err := firewall.Compile(d)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// TestPersistedForward checks that our chains in mangle are written to a file and removed
// from it again, and that the administrator's rules of that table stay.
func TestPersistedForward(t *testing.T) {
	const filter = "*filter\n:INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\nCOMMIT\n"
	const clamp = "-A FORWARD -p tcp -m tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu"
	const theirs = "*mangle\n:PREROUTING ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n[3:180] " + clamp + "\n-A PREROUTING -i eth9 -j MARK --set-mark 1\nCOMMIT\n"
	leave, err := firewall.Compile(webMail())
	if err != nil {
		t.Fatal(err)
	}
	for name, original := range map[string]string{"none": "", "filter": filter, "mangle before": theirs + filter, "mangle after": filter + theirs, "mangle alone": theirs} {
		file := []byte(original)
		for _, r := range []firewall.Ruleset{held(t), held(t), leave, held(t)} {
			was := file
			if file, err = (Files{}).Persisted(was, r, firewall.IPv4); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			text := string(file)
			if again, err := (Files{}).Persisted(file, r, firewall.IPv4); err != nil || string(again) != text {
				t.Errorf("%s: it changes again: %v\n%s", name, err, cmp.Diff(text, string(again)))
			}
			jump, rules := strings.Index(text, "-A FORWARD "+forwardJump+"\n"), strings.Count(text, "-j BASICFW-PUBLISHED\n")
			if (jump > 0) != r.Forwards() || (rules == 1) != r.Forwards() || strings.Count(text, "*mangle") > 1 {
				t.Errorf("%s: forward rules %v:\n%s", name, r.Forwards(), text)
			}
			if i := strings.Index(text, clamp); strings.Contains(original, clamp) && (i < 0 || i < jump) || !strings.Contains(original, "mangle") && i > 0 {
				t.Errorf("%s: the administrator's rules:\n%s", name, text)
			}
		}
		back, err := (Files{}).Unpersisted(file, []byte(original))
		if err != nil || strings.Contains(string(back), "BASICFW") || strings.Contains(string(back), "*mangle") != strings.Contains(original, "*mangle") ||
			strings.Contains(string(back), clamp) != strings.Contains(original, clamp) {
			t.Errorf("%s: without our rules, %v:\n%s", name, err, back)
		}
		if aside, err := (Files{}).Aside(file); err != nil || strings.Contains(string(aside), "BASICFW") {
			t.Errorf("%s: for another backend, %v:\n%s", name, err, aside)
		}
	}
}

// TestForwardJump checks where our jump in FORWARD has to be, and what changes it.
func TestForwardJump(t *testing.T) {
	const other, accept = "-p tcp -j TCPMSS --clamp-mss-to-pmtu", "-i eth1 -j ACCEPT"
	want := []chain{{Name: firewall.ForwardChain, Rules: []string{"-j RETURN"}}}
	for _, tt := range []struct {
		name  string
		rules []string
		want  []string // the lines that change FORWARD
	}{
		{"none", nil, []string{"-I FORWARD 1 " + forwardJump}},
		{"first", []string{forwardJump, accept}, nil},
		{"after a rule that does not decide", []string{other, forwardJump}, nil},
		{"after one that does", []string{accept, forwardJump}, []string{"-D FORWARD " + forwardJump, "-I FORWARD 1 " + forwardJump}},
		{"after a return", []string{"-s 192.0.2.1/32 -j RETURN", forwardJump}, []string{"-D FORWARD " + forwardJump, "-I FORWARD 1 " + forwardJump}},
		{"twice", []string{forwardJump, forwardJump}, []string{"-D FORWARD " + forwardJump, "-D FORWARD " + forwardJump, "-I FORWARD 1 " + forwardJump}},
	} {
		m := table{Name: mangle, Chains: []chain{{Name: forward, Policy: firewall.Accept, Rules: tt.rules}, want[0]}}
		if diff := cmp.Diff(tt.want, jumpLines(m, want)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, diff)
		}
		if got := effectsOf(m).forwardDrift(firewall.IPv4, want); (len(got) == 0) != (tt.want == nil) {
			t.Errorf("%s: drift %v", tt.name, got)
		}
	}
}
