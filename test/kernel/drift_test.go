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

// damage is a manual change of a bootstrapped machine.
type damage struct {
	name string
	// where is a family and a chain, or a path; what are further words. Both have to be in
	// the line that names the damage.
	where, what []string
	do          func(t *testing.T, m *machine)
}

// TestDrift damages a machine in every way that matters, one at a time: each rule of both
// families is removed and altered. Each damage has to be found, named and repaired.
func TestDrift(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		if !m.netlink { // another program's jump, which ours can be moved in front of
			for _, family := range families() {
				m.load(t, family, "*filter\n:f2b-sshd - [0:0]\n-A INPUT -p tcp -m tcp --dport 22 -j f2b-sshd\n-A f2b-sshd -j RETURN\nCOMMIT\n", "--noflush")
			}
		}
		m.bootstrap(t)
		if m.netlink { // networks give their rules a set of their own
			m.must(t, exitOK, "ssh", "allow", "203.0.113.0/24", "2001:db8:7::/48")
		}
		rules := m.rules(t)
		files := m.tree(t, false, "etc")
		all := m.fileDamages()
		if m.netlink {
			all = append(all, tableDamages(m.table(t))...)
		} else {
			for _, family := range families() {
				all = append(all, ruleDamages(m.filter(t, family), family)...)
				all = append(all, forwardDamages(family)...)
			}
		}
		if len(all) < 150 {
			t.Errorf("only %d kinds of damage: are the rules loaded?", len(all))
		}
		for _, d := range all {
			d.do(t, m)
			words := append(slices.Clone(d.where), d.what...)
			if got := m.agent(t, "verify"); got.Code != exitDrift || !named(got.Stdout, words) {
				t.Errorf("%s: verify: exit code %d, want %d and a line with %q\n%s%s", d.name, got.Code, exitDrift, words, got.Stdout, got.Stderr)
			}
			// status cuts a line that does not fit.
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
				t.Fatalf("%s: the rules are not repaired:%s", d.name, difference(rules, got))
			}
			if got := m.tree(t, false, "etc"); got != files {
				t.Fatalf("%s: the files are not repaired:%s", d.name, difference(files, got))
			}
		}
		m.must(t, exitOK, "status")
	})
}

// named reports whether one line of a text has all the words.
func named(text string, words []string) bool {
	return slices.ContainsFunc(strings.Split(text, "\n"), func(line string) bool {
		return !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(line, w) })
	})
}

// ruleDamages returns every damage to the rules of a family. lines is its filter table as
// it should be.
func ruleDamages(lines []string, family string) []damage {
	var all []damage
	// add loads the table as changed by change.
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

// forwardDamages returns damages to the rules for forwarded packets.
func forwardDamages(family string) (all []damage) {
	for _, d := range []struct{ commands, where, what string }{
		{"-F", "mangle FORWARD", "BASICFW-FORWARD"},
		{"-F; -X", "BASICFW-FORWARD", "the chain"},
		{"-D FORWARD -j BASICFW-FORWARD", "mangle FORWARD", "BASICFW-FORWARD"},
		{"-I FORWARD -j BASICFW-FORWARD", "mangle FORWARD", "BASICFW-FORWARD"},
		{"-I FORWARD -p tcp -j BASICFW-PUBLISHED", "mangle FORWARD", "BASICFW-PUBLISHED"},
		{"-I BASICFW-FORWARD -j RETURN", "BASICFW-FORWARD", "RETURN"},
		{"-D BASICFW-PUBLISHED -m comment --comment basicfw-published -j DROP", "BASICFW-PUBLISHED", "basicfw-published"},
		{"-N BASICFW-OLD", "BASICFW-OLD", "the chain"},
	} {
		all = append(all, damage{name: family + ": mangle " + d.commands, where: []string{family, d.where}, what: []string{d.what}, do: func(t *testing.T, m *machine) {
			t.Helper()
			for _, args := range strings.Split(d.commands, "; ") {
				m.iptables(t, family, append([]string{"-t", "mangle"}, strings.Fields(args)...)...)
			}
		}})
	}
	return all
}

// altered changes a rule.
func altered(rule string) string {
	for _, change := range [][2]string{
		{"-j ACCEPT", "-j DROP"}, {"-j DROP", "-j ACCEPT"}, {"-j BASICFW-SSH", "-j ACCEPT"}, {"--limit 1/sec", "--limit 6/sec"},
	} {
		if strings.Contains(rule, change[0]) {
			return strings.Replace(rule, change[0], change[1], 1)
		}
	}
	panic("a rule that this test cannot alter: " + rule)
}

// tableDamages returns every damage to our table of nf_tables. text is the table as it
// should be.
func tableDamages(text string) []damage {
	var all []damage
	// add loads the table as changed by change.
	add := func(name string, change func(lines []string) []string, where []string, what ...string) {
		text := "add table inet basicfw\ndelete table inet basicfw\n" + strings.Join(change(strings.Split(text, "\n")), "\n")
		all = append(all, damage{name: name, where: where, what: what, do: func(t *testing.T, m *machine) { t.Helper(); m.nft(t, text) }})
	}
	// replace adds a replacement of all occurrences of old.
	replace := func(name, old, new string, where []string, what ...string) {
		add(name, func(lines []string) []string {
			text := strings.Join(lines, "\n")
			if !strings.Contains(text, old) {
				panic("a table that this test cannot change: " + old + "\n" + text)
			}
			return strings.Split(strings.ReplaceAll(text, old, new), "\n")
		}, where, what...)
	}
	ours := map[string][]int{} // lines of our chains' rules
	begins := map[string]int{}
	chain := ""
	lines := strings.Split(text, "\n")
	for i, l := range lines {
		if name, ok := strings.CutPrefix(l, "\tchain "); ok {
			chain = strings.Fields(name)[0]
			begins[chain] = i
		}
		_, comment, ok := strings.Cut(l, `comment "`)
		if !ok {
			continue
		}
		comment = strings.TrimSuffix(comment, `"`)
		ours[chain] = append(ours[chain], i)
		where := []string{chain}
		if family, _, ok := strings.Cut(chain, "-"); ok {
			where = append(where, family+" ")
		}
		rule := strings.TrimSpace(l)
		add("removed: "+chain+" "+rule, func(lines []string) []string { return slices.Delete(lines, i, i+1) }, where, comment)
		add("altered: "+chain+" "+rule, func(lines []string) []string { lines[i] = alteredInTable(l); return lines }, where, comment)
		// With a match that none of our rules has.
		add("narrowed: "+chain+" "+rule, func(lines []string) []string { lines[i] = "\t\tmeta mark 0 " + rule; return lines }, where, comment)
	}
	for chain, at := range ours {
		for _, i := range []int{at[0], at[len(at)/2], at[len(at)-1] + 1} {
			add(fmt.Sprintf("inserted into %s, line %d", chain, i), func(lines []string) []string {
				return slices.Insert(lines, i, "\t\ttcp dport 31337 accept")
			}, []string{chain}, "31337")
		}
		family, _, ok := strings.Cut(chain, "-")
		if !ok {
			continue
		}
		i, j := at[0], at[len(at)-1]
		add("order of "+chain, func(lines []string) []string {
			lines[i], lines[j] = lines[j], lines[i]
			return lines
		}, []string{family, chain})
		add("chain removed: "+chain, func(lines []string) []string {
			lines = slices.Delete(lines, begins[chain], j+2)
			return strings.Split(strings.ReplaceAll(strings.Join(lines, "\n"), "jump "+chain, "accept"), "\n")
		}, []string{family, chain})
	}
	input := []string{"input"}
	replace("policy", "policy drop;", "policy accept;", input, "policy")
	replace("another hook", "hook input", "hook forward", input, "hook")
	replace("another priority", "priority filter", "priority raw", input, "hook")
	replace("dormant", "table inet basicfw {", "table inet basicfw {\n\tflags dormant", input, "dormant")
	replace("a family is accepted", "ipv6 : jump ipv6-input", "ipv6 : accept", input, "ipv6 : accept")
	replace("no family is filtered", "\t\tmeta nfproto vmap { ipv4 : jump ipv4-input, ipv6 : jump ipv6-input }\n", "", input, "vmap")
	replace("a wider network", "203.0.113.0/24", "203.0.112.0/23", []string{"ipv4", "ipv4-ssh"}, "203.0.112.0/23")
	replace("a shorter timeout of a limit", "timeout 2s", "timeout 1s", []string{"bfw4p10s"})
	replace("a chain that looks like ours", "\tchain input {", "\tchain ipv4-old {\n\t}\n\tchain input {", []string{"ipv4-old"})
	replace("a chain before ours", "\tchain input {", "\tchain early {\n\t\ttype filter hook input priority -10; policy accept;\n\t}\n\tchain input {", []string{"early"})
	replace("another program's set", "\tchain input {", "\tset theirs {\n\t\ttype ipv4_addr\n\t}\n\tchain input {", []string{"theirs"})
	all = append(all,
		damage{"the table is gone", input, []string{"table inet basicfw"}, func(t *testing.T, m *machine) { m.nft(t, "delete table inet basicfw") }},
		damage{"the table is empty", input, nil, func(t *testing.T, m *machine) {
			m.nft(t, "delete table inet basicfw; add table inet basicfw")
		}},
	)
	return all
}

// alteredInTable is altered for a rule as nft prints it.
func alteredInTable(rule string) string {
	for _, change := range [][2]string{
		{" accept comment", " drop comment"}, {" drop comment", " accept comment"}, {"jump ipv4-ssh", "accept"}, {"jump ipv6-ssh", "accept"}, {" return comment", " accept comment"},
		{"jump ipv4-published", "accept"}, {"jump ipv6-published", "accept"}, {"rate 1/second", "rate 6/second"},
	} {
		if strings.Contains(rule, change[0]) {
			return strings.Replace(rule, change[0], change[1], 1)
		}
	}
	panic("a rule that this test cannot alter: " + rule)
}

// fileDamages returns every damage to the persisted files.
func (m *machine) fileDamages() []damage {
	if m.netlink {
		return fileDamages(tableFile, `"basicfw-invalid"`, "policy drop;", "policy accept;", "chain ipv4-input {\n", "tcp dport 31337 accept\n",
			`drop comment "basicfw-invalid"`, `accept comment "basicfw-invalid"`)
	}
	var all []damage
	for _, family := range families() {
		all = append(all, fileDamages(rulesFile(family), "basicfw-invalid ", ":INPUT DROP", ":INPUT ACCEPT", "-A INPUT -j BASICFW-INPUT\n", "-A BASICFW-INPUT -p tcp -m tcp --dport 31337 -j ACCEPT\n",
			"basicfw-invalid -j DROP", "basicfw-invalid -j ACCEPT")...)
	}
	return all
}

// fileDamages returns every damage to one persisted file. invalid occurs in a rule of it,
// whose part drop is replaced by accept. closes is the policy, replaced by opens. rule is
// inserted after before.
func fileDamages(path, invalid, closes, opens, before, rule, drop, accept string) []damage {
	policy := strings.Fields(strings.Trim(closes, ":"))[0] // INPUT's, or the word itself
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
		{"file with garbage", nil, nil, edit(func(string) string { return "\x00\xffnot a rule\n" })},
		{"file truncated", nil, nil, edit(func(s string) string { return s[:len(s)/2] })},
		{"file readable by everyone", nil, nil, func(t *testing.T, m *machine) { check(t, os.Chmod(at(m), 0o644)) }},
		{"file writable by everyone", nil, nil, func(t *testing.T, m *machine) { check(t, os.Chmod(at(m), 0o666)) }},
		{"rule removed from file", nil, []string{"basicfw-invalid"}, edit(func(s string) string {
			return strings.Join(slices.DeleteFunc(strings.Split(s, "\n"), func(l string) bool { return strings.Contains(l, invalid) }), "\n")
		})},
		{"rule altered in file", nil, []string{"basicfw-invalid"}, edit(func(s string) string {
			return strings.Replace(s, drop, accept, 1)
		})},
		{"rule added to file", nil, []string{"31337"}, edit(func(s string) string {
			return strings.Replace(s, before, before+rule, 1)
		})},
		{"policy altered in file", nil, []string{policy}, edit(func(s string) string {
			return strings.Replace(s, closes, opens, 1)
		})},
	}
	for i := range all {
		all[i].name = path + ": " + all[i].name
		all[i].where = []string{path}
	}
	return all
}

// TestDriftInJSON checks the drift in status --json.
func TestDriftInJSON(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.bootstrap(t)
		m.remove(t, ipv6, "SSH", "ssh-drop")
		m.by(t, hand{"-I BASICFW-INPUT 1 -p tcp --dport 31337 -j ACCEPT", "insert rule inet basicfw FAMILY-input tcp dport 31337 accept"}, ipv4)
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
		if d := status.Drift[0]; d.Family != ipv4 || d.Chain != m.chain(ipv4, "INPUT") || d.Kind != "extra" || !strings.Contains(d.Got, "31337") {
			t.Errorf("got %+v", d)
		}
		if d := status.Drift[1]; d.Family != ipv6 || d.Chain != m.chain(ipv6, "SSH") || d.Kind != "missing" || !strings.Contains(d.Want, "basicfw-ssh-drop") {
			t.Errorf("got %+v", d)
		}
	})
}
