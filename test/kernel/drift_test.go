package kernel_test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// damage is something that somebody does to a machine that stands.
type damage struct {
	name string
	// where is a family and a chain, or a path; what may be a word more. Both
	// have to be in the line that names it.
	where, what []string
	do          func(t *testing.T, m *machine)
}

// TestDrift breaks a machine in every way that matters, one at a time: each
// rule of both families is taken away and altered. Each has to be found, named
// and mended.
func TestDrift(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		// Somebody else's jump, so that ours has something to be moved before.
		for _, family := range families() {
			m.load(t, family, "*filter\n:f2b-sshd - [0:0]\n-A INPUT -p tcp -m tcp --dport 22 -j f2b-sshd\n-A f2b-sshd -j RETURN\nCOMMIT\n", "--noflush")
		}
		m.bootstrap(t)
		rules := m.rules(t)
		files := m.tree(t, false, "etc")
		var all []damage
		for _, family := range families() {
			all = append(all, ruleDamages(m.filter(t, family), family)...)
			all = append(all, fileDamages(family)...)
		}
		if len(all) < 150 {
			t.Errorf("only %d kinds of damage: are the rules there?", len(all))
		}
		for _, d := range all {
			d.do(t, m)
			words := append(slices.Clone(d.where), d.what...)
			if got := m.agent(t, "verify"); got.Code != exitDrift || !named(got.Stdout, words) {
				t.Errorf("%s: verify: exit code %d, want %d and a line with %q\n%s%s", d.name, got.Code, exitDrift, words, got.Stdout, got.Stderr)
			}
			// Where there is no room for all of a line, status cuts it.
			if got := m.agent(t, "status"); got.Code != exitDrift || !named(got.Stdout, d.where) || strings.HasPrefix(got.Stdout, "protected") {
				t.Errorf("%s: status: exit code %d, want %d and a line with %q\n%s%s", d.name, got.Code, exitDrift, d.where, got.Stdout, got.Stderr)
			}
			if got := m.agent(t, "verify", "--repair"); got.Code != exitOK {
				t.Errorf("%s: verify --repair: exit code %d\n%s%s", d.name, got.Code, got.Stdout, got.Stderr)
			}
			if got := m.agent(t, "verify"); got.Code != exitOK {
				t.Errorf("%s: verify after the repair: exit code %d\n%s%s", d.name, got.Code, got.Stdout, got.Stderr)
			}
			if got := m.rules(t); got != rules {
				t.Fatalf("%s: the rules are not mended:%s", d.name, difference(rules, got))
			}
			if got := m.tree(t, false, "etc"); got != files {
				t.Fatalf("%s: the files are not mended:%s", d.name, difference(files, got))
			}
		}
		m.must(t, exitOK, "status")
	})
}

// named tells whether some line of a text has all the words.
func named(text string, words []string) bool {
	return slices.ContainsFunc(strings.Split(text, "\n"), func(line string) bool {
		return !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(line, w) })
	})
}

// ruleDamages are all that can happen to the rules of a family. lines are its
// filter table as it should be.
func ruleDamages(lines []string, family string) []damage {
	var all []damage
	// add loads the table as change makes it.
	add := func(name string, change func(lines []string) []string, chain string, what ...string) {
		text := strings.Join(change(slices.Clone(lines)), "\n") + "\n"
		all = append(all, damage{
			name:  family + ": " + name,
			where: []string{family, chain},
			what:  what,
			do:    func(t *testing.T, m *machine) { t.Helper(); m.load(t, family, text) },
		})
	}
	const jump = "-A INPUT -j BASICFW-INPUT"
	ours := map[string][]int{} // lines of our chains' rules
	for i, l := range lines {
		words := strings.Fields(l)
		switch {
		case strings.HasPrefix(l, "-A BASICFW-"):
			chain := words[1]
			ours[chain] = append(ours[chain], i)
			comment := words[slices.Index(words, "--comment")+1]
			add("removed: "+l, func(lines []string) []string { return slices.Delete(lines, i, i+1) }, chain, comment)
			add("altered: "+l, func(lines []string) []string { lines[i] = altered(l); return lines }, chain, comment)
		case strings.HasPrefix(l, ":BASICFW-"):
			chain := words[0][1:]
			add("chain removed: "+chain, func(lines []string) []string {
				return slices.DeleteFunc(lines, func(l string) bool {
					return strings.HasPrefix(l, ":"+chain+" ") || strings.HasPrefix(l, "-A "+chain+" ") || strings.HasSuffix(l, "-j "+chain)
				})
			}, chain)
		}
	}
	for chain, at := range ours {
		for _, i := range []int{at[0], at[len(at)/2], at[len(at)-1] + 1} {
			add(fmt.Sprintf("inserted into %s, line %d", chain, i), func(lines []string) []string {
				return slices.Insert(lines, i, "-A "+chain+" -p tcp -m tcp --dport 31337 -j ACCEPT")
			}, chain, "31337")
		}
		if len(at) > 1 {
			i, j := at[0], at[len(at)-1]
			add("order of "+chain, func(lines []string) []string {
				lines[i], lines[j] = lines[j], lines[i]
				return lines
			}, chain)
		}
	}
	replace := func(old string, new ...string) func([]string) []string {
		return func(lines []string) []string {
			i := slices.Index(lines, old)
			return slices.Replace(lines, i, i+1, new...)
		}
	}
	add("policy of INPUT", replace(":INPUT DROP", ":INPUT ACCEPT"), "INPUT", "policy")
	add("policy of OUTPUT", replace(":OUTPUT ACCEPT", ":OUTPUT DROP"), "OUTPUT", "policy")
	add("jump removed", replace(jump), "INPUT", "BASICFW-INPUT")
	add("jump twice", replace(jump, jump, jump), "INPUT", "BASICFW-INPUT")
	add("jump narrowed", replace(jump, "-A INPUT -p tcp -j BASICFW-INPUT"), "INPUT", "BASICFW-INPUT")
	add("jump before another's", func(lines []string) []string {
		i := slices.Index(lines, jump)
		lines[i], lines[i-1] = lines[i-1], lines[i]
		return lines
	}, "INPUT", "BASICFW-INPUT")
	add("a second way into our chain", replace(jump, "-A INPUT -p tcp -j BASICFW-SSH", jump), "INPUT", "BASICFW-SSH")
	add("a chain that looks like ours", replace(":BASICFW-INPUT -", ":BASICFW-INPUT -", ":BASICFW-OLD -"), "BASICFW-OLD")
	return all
}

// altered makes another rule of a rule.
func altered(rule string) string {
	for _, change := range [][2]string{
		{"-j ACCEPT", "-j DROP"}, {"-j DROP", "-j ACCEPT"}, {"-j BASICFW-SSH", "-j ACCEPT"}, {"--limit 5/sec", "--limit 6/sec"},
	} {
		if strings.Contains(rule, change[0]) {
			return strings.Replace(rule, change[0], change[1], 1)
		}
	}
	panic("a rule that this test cannot alter: " + rule)
}

// fileDamages are what can happen to the file that keeps the rules of a family.
func fileDamages(family string) []damage {
	path := rulesFile(family)
	at := func(m *machine) string { return filepath.Join(m.root, path) }
	check := func(t *testing.T, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	edit := func(change func(text string) string) func(*testing.T, *machine) {
		return func(t *testing.T, m *machine) {
			t.Helper()
			text := m.read(t, path)
			next := change(text)
			if next == text {
				t.Fatalf("nothing to change in %s", text)
			}
			m.write(t, path, next, 0o600)
		}
	}
	all := []damage{
		{"file removed", nil, nil, func(t *testing.T, m *machine) { check(t, os.Remove(at(m))) }},
		{"file empty", nil, nil, edit(func(string) string { return "" })},
		{"file of rubbish", nil, nil, edit(func(string) string { return "\x00\xffnot a rule\n" })},
		{"file cut off", nil, nil, edit(func(s string) string { return s[:len(s)/2] })},
		{"file for all to read", nil, nil, func(t *testing.T, m *machine) { check(t, os.Chmod(at(m), 0o644)) }},
		{"file for all to write", nil, nil, func(t *testing.T, m *machine) { check(t, os.Chmod(at(m), 0o666)) }},
		{"rule removed from file", nil, []string{"basicfw-invalid"}, edit(func(s string) string {
			return strings.Join(slices.DeleteFunc(strings.Split(s, "\n"), func(l string) bool { return strings.Contains(l, "basicfw-invalid") }), "\n")
		})},
		{"rule altered in file", nil, []string{"basicfw-invalid"}, edit(func(s string) string {
			return strings.Replace(s, "basicfw-invalid -j DROP", "basicfw-invalid -j ACCEPT", 1)
		})},
		{"rule added to file", nil, []string{"31337"}, edit(func(s string) string {
			return strings.Replace(s, "-A BASICFW-INPUT", "-A BASICFW-INPUT -p tcp -m tcp --dport 31337 -j ACCEPT\n-A BASICFW-INPUT", 1)
		})},
		{"policy altered in file", nil, []string{"INPUT"}, edit(func(s string) string {
			return strings.Replace(s, ":INPUT DROP", ":INPUT ACCEPT", 1)
		})},
	}
	for i := range all {
		all[i].name = family + ": " + all[i].name
		all[i].where = []string{path}
	}
	return all
}

// TestDriftInJSON looks at what programs are told about a broken machine.
func TestDriftInJSON(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.bootstrap(t)
		m.iptables(t, ipv6, "-D", "INPUT", "-j", "BASICFW-INPUT")
		m.iptables(t, ipv4, "-I", "BASICFW-INPUT", "1", "-p", "tcp", "--dport", "31337", "-j", "ACCEPT")
		var status struct {
			State string `json:"state"`
			Drift []struct{ Family, Chain, Kind, Want, Got string }
			Next  []string `json:"next"`
		}
		r := m.must(t, exitDrift, "status", "--json")
		if err := json.Unmarshal([]byte(r.Stdout), &status); err != nil {
			t.Fatalf("%v\n%s", err, r.Stdout)
		}
		if status.State != "drifted" || len(status.Drift) != 2 || len(status.Next) == 0 {
			t.Fatalf("got %+v", status)
		}
		if d := status.Drift[0]; d.Family != ipv4 || d.Chain != "BASICFW-INPUT" || d.Kind != "extra" || !strings.Contains(d.Got, "31337") {
			t.Errorf("got %+v", d)
		}
		if d := status.Drift[1]; d.Family != ipv6 || d.Chain != "INPUT" || d.Kind != "missing" || !strings.Contains(d.Want, "BASICFW-INPUT") {
			t.Errorf("got %+v", d)
		}
	})
}
