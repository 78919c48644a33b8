package nftables

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/test/lab"
)

// What is persisted means the same when it is read again, and is what nft loads
// over whatever is there.
func TestPersisted(t *testing.T) {
	for name, d := range wishes() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			rules := compiledRules(t, d)
			file := Files{}.Persisted(rules, firewall.Families[:])
			read, err := Files{}.Parse(file)
			if err != nil {
				t.Fatalf("%v\n%s", err, file)
			}
			if diff := cmp.Diff(string(file), string(Files{}.Persisted(read, firewall.Families[:]))); diff != "" {
				t.Errorf("(-written +read and written):\n%s", diff)
			}
			k := newKernel(t)
			k.load(t, compiledRules(t, wishes()["quiet"]))
			for range 2 {
				if r := k.Run(t, lab.Command{Args: []string{"nft", "-f", "-"}, Stdin: string(file)}); r.Code != 0 {
					t.Fatalf("nft: %s", r.Stderr)
				}
			}
			if in := k.inspect(t, rules); len(in.Drift) > 0 {
				t.Errorf("%v", in.Drift)
			}
		})
	}
}

func TestParseRefuses(t *testing.T) {
	file := string(Files{}.Persisted(compiledRules(t, wishes()["every"]), firewall.Families[:]))
	for name, change := range map[string][2]string{
		"another expression":   {"tcp dport 80 ", "tcp dport 80 meta random 7 "},
		"each with each":       {"tcp dport 80 ", "ip saddr @ipv4-ssh tcp dport { 80, 81 } "},
		"an unknown flag":      {"tcp flags ! fin", "tcp flags ! fun"},
		"a jump to nowhere":    {"jump ipv4-ssh", "jump ipv4-ssj"},
		"a port too many":      {"dport 8443", "dport 84430"},
		"no network":           {"10.0.0.0/13", "10.0.0.0/33"},
		"a set that is gone":   {"@ipv4-ssh ", "@ipv4-sshh "},
		"a chain twice":        {"chain ipv4-db {", "chain ipv4-ssh {"},
		"another level":        {"level debug", "level emerg"},
		"no verdict":           {"8443 ct state new meta time < 2114380801 counter packets 0 bytes 0 accept", "8443"},
		"something in between": {"\tchain ipv6-input {", "\tmap x {\n\tchain ipv6-input {"},
	} {
		broken := strings.Replace(file, change[0], change[1], 1)
		if broken == file {
			t.Fatalf("%s: nothing to change", name)
		}
		if _, err := (Files{}).Parse([]byte(broken)); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	if _, err := (Files{}).Parse(nil); err == nil {
		t.Error("an empty file is taken")
	}
	if _, err := (Files{}).Parse([]byte(strings.TrimSuffix(file, "}\n"))); err == nil {
		t.Error("a file without its last line is taken")
	}
	if _, err := (Files{}).Parse([]byte(file + "\tchain ipv4-x {\n\t}\n")); err == nil {
		t.Error("a file that goes on behind its end is taken")
	}
}

// What is taken is a ruleset that can be loaded, and reads the same again.
func FuzzParse(f *testing.F) {
	for _, d := range wishes() {
		f.Add(Files{}.Persisted(compiledRules(f, d), firewall.Families[:]))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		rules, err := Files{}.Parse(data)
		if err != nil {
			return
		}
		file := Files{}.Persisted(rules, firewall.Families[:])
		again, err := Files{}.Parse(file)
		if err != nil {
			t.Fatalf("%v\n%s", err, file)
		}
		if string(Files{}.Persisted(again, firewall.Families[:])) != string(file) {
			t.Errorf("another one:\n%s", file)
		}
	})
}
