// Package docs_test compares the documentation with the program.
package docs_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/agent/exposure"
	"github.com/basicfw/basicfw-agent/agent/host"
	"github.com/basicfw/basicfw-agent/agent/report"
	"github.com/basicfw/basicfw-agent/agent/selftest"
	"github.com/basicfw/basicfw-agent/agent/settings"
	"github.com/basicfw/basicfw-agent/test/lab"
)

// TestProgram compares the manual with what the program prints.
func TestProgram(t *testing.T) {
	binary := build(t)
	t.Run("commands", func(t *testing.T) { testCommands(t, binary) })
	t.Run("examples", func(t *testing.T) { testExamples(t, binary) })
	t.Run("rules", func(t *testing.T) { testRules(t, binary) })
}

// build compiles the program and returns its path.
func build(t *testing.T) string {
	t.Helper()
	binary := filepath.Join(t.TempDir(), "basicfw-agent")
	if out, err := exec.Command("go", "build", "-o", binary, "../cmd/basicfw-agent").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return binary
}

func run(t *testing.T, binary string, args ...string) string {
	t.Helper()
	out, err := exec.Command(binary, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v\n%s", args, err, out)
	}
	return string(out)
}

func read(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// page returns the text of a man page by section: "COMMANDS" for .SH,
// "COMMANDS/plan" for .SS.
func page(t *testing.T, file string) map[string]string {
	t.Helper()
	sections := map[string]string{}
	head, at := "", ""
	for _, line := range strings.Split(read(t, file), "\n") {
		macro, text := plain(line)
		switch macro {
		case "SH":
			head, at = text, text
		case "SS":
			at = head + "/" + text
		default:
			sections[at] += text + "\n"
		}
	}
	return sections
}

var (
	fonts = regexp.MustCompile(`\\f[A-Z]`)
	words = regexp.MustCompile(`"[^"]*"|[^ "]+`)
)

// plain returns the macro of a line of a man page, and its text as rendered. A macro
// with two fonts, such as .BR, joins its words.
func plain(line string) (macro, text string) {
	line = strings.NewReplacer(`\-`, "-", `\e`, `\`).Replace(fonts.ReplaceAllString(line, ""))
	if !strings.HasPrefix(line, ".") {
		return "", line
	}
	macro, rest, _ := strings.Cut(line[1:], " ")
	args := words.FindAllString(rest, -1)
	for i := range args {
		args[i] = strings.Trim(args[i], `"`)
	}
	if len(macro) == 2 && strings.Trim(macro, "BIR") == "" {
		return macro, strings.Join(args, "")
	}
	return macro, strings.Join(args, " ")
}

// explains reports whether a text has an entry for a flag, not only its name.
func explains(text, flag string) bool {
	return regexp.MustCompile(`(?m)^(-[a-z], )?` + flag + `($|[ ,])`).MatchString(text)
}

// has reports whether a text contains a whole word.
func has(text, word string) bool {
	return regexp.MustCompile(`(^|[^a-z0-9_-])` + regexp.QuoteMeta(word) + `($|[^a-z0-9_-])`).MatchString(text)
}

var (
	commandLine = regexp.MustCompile(`(?m)^  ([a-z-]+) +[A-Z]`)
	flagLine    = regexp.MustCompile(`(?m)^ +(?:-([a-z]), )? *--([a-z0-9-]+)`)
)

// help returns the commands and flags that --help lists.
func help(text string) (commands, flags []string) {
	text, _, _ = strings.Cut(text, "\nGlobal Flags:")
	text, list, _ := strings.Cut(text, "\nFlags:\n")
	for _, m := range flagLine.FindAllStringSubmatch(list, -1) {
		flags = append(flags, "--"+m[2])
		if m[1] != "" {
			flags = append(flags, "-"+m[1])
		}
	}
	if _, list, ok := strings.Cut(text, "\nAvailable Commands:\n"); ok {
		for _, m := range commandLine.FindAllStringSubmatch(list, -1) {
			commands = append(commands, m[1])
		}
	}
	return commands, flags
}

// testCommands checks that the manual has exactly the commands and flags that --help
// lists.
func testCommands(t *testing.T, binary string) {
	man := page(t, "basicfw-agent.8")
	commands, flags := help(run(t, binary, "--help"))
	if len(commands) < 10 || len(flags) < 5 {
		t.Fatalf("--help lists commands %q, flags %q", commands, flags)
	}
	for _, f := range flags {
		if !explains(man["GLOBAL FLAGS"], f) {
			t.Errorf("the manual lacks the flag %s", f)
		}
	}
	for _, c := range commands {
		text, ok := man["COMMANDS/"+c]
		if !ok {
			t.Errorf("the manual lacks the command %s", c)
		}
		known := []string{}
		var visit func(path []string)
		visit = func(path []string) {
			below, flags := help(run(t, binary, append(path, "--help")...))
			for _, f := range flags {
				if f != "--help" && f != "-h" && !explains(text, f) {
					t.Errorf("the manual lacks %v %s", path, f)
				}
			}
			for _, b := range below {
				if !has(text, b) {
					t.Errorf("the manual lacks %v %s", path, b)
				}
			}
			known = append(known, flags...)
			for _, b := range below {
				visit(append(slices.Clone(path), b))
			}
		}
		visit([]string{c})
		for _, f := range regexp.MustCompile(`(?m)^--[a-z0-9-]+`).FindAllString(text, -1) {
			if !slices.Contains(known, f) && !slices.Contains(flags, f) {
				t.Errorf("the manual has %s %s, the program does not", c, f)
			}
		}
	}
	for name := range man {
		if c, ok := strings.CutPrefix(name, "COMMANDS/"); ok && !slices.Contains(commands, c) {
			t.Errorf("the manual has the command %s, the program does not", c)
		}
	}
}

// TestSettings checks that the manual has exactly the keys, with their defaults, of
// the settings file that the package installs.
func TestSettings(t *testing.T) {
	man := page(t, "basicfw-agent.ini.5")
	entry := regexp.MustCompile(`(?m)^([a-z_]+) \(default: (.*)\)$`)
	got, want := map[string]string{}, map[string]string{}
	for name, text := range man {
		for _, m := range entry.FindAllStringSubmatch(text, -1) {
			got[name+" "+m[1]] = m[2]
		}
	}
	shipped := read(t, "../packaging/rpm/agent.ini")
	defaults := settings.Defaults()
	_, values, _ := strings.Cut(defaults.Set("agent", "backend", "unknown", "").Error(), "want ")
	if !strings.Contains(shipped, ": "+values+"\n#backend") {
		t.Errorf("agent.ini does not list the values of backend: %s", values)
	}
	section := ""
	for _, line := range strings.Split(shipped, "\n") {
		if strings.HasPrefix(line, "[") {
			section = line
			if _, ok := man[section]; !ok {
				t.Errorf("the manual lacks the section %s", section)
			}
		}
		if m := regexp.MustCompile(`^#([a-z_]+) = ?(.*)$`).FindStringSubmatch(line); m != nil {
			want[section+" "+m[1]] = m[2]
			if m[2] == "" {
				want[section+" "+m[1]] = "none"
			}
		}
	}
	if len(want) < 10 {
		t.Errorf("agent.ini has only %v", want)
	}
	for key, value := range want {
		if got[key] != value {
			t.Errorf("%s: the default is %q in the manual, %q in agent.ini", key, got[key], value)
		}
	}
	for key := range got {
		if _, ok := want[key]; !ok {
			t.Errorf("%s: agent.ini lacks it", key)
		}
	}
}

// TestStatus checks that the manual has every state, key and warning code of status --json.
func TestStatus(t *testing.T) {
	man := page(t, "basicfw-agent.8")
	for _, state := range report.Conditions {
		if !has(man["STATUS/States"], state) {
			t.Errorf("the manual lacks the state %s", state)
		}
	}
	for _, code := range report.Codes() {
		if !has(man["STATUS/JSON"], code) {
			t.Errorf("the manual lacks the code %s", code)
		}
	}
	for _, key := range keys(reflect.TypeFor[report.Status]()) {
		if !has(man["STATUS/JSON"], key) {
			t.Errorf("the manual lacks the key %s", key)
		}
	}
}

// TestMetrics checks that the manual has every metric.
func TestMetrics(t *testing.T) {
	man := page(t, "basicfw-agent.8")
	text := string(report.Metrics{Verified: time.Now(), Conntrack: host.Conntrack{Max: 1}}.Text())
	for _, m := range regexp.MustCompile(`(?m)^# TYPE (\S+)`).FindAllStringSubmatch(text, -1) {
		if !has(man["STATUS/Metrics"], m[1]) {
			t.Errorf("the manual lacks the metric %s", m[1])
		}
	}
}

// TestSelftest checks that the manual has every key of selftest --json.
func TestSelftest(t *testing.T) {
	text := page(t, "basicfw-agent.8")["COMMANDS/selftest"]
	for _, key := range keys(reflect.TypeFor[selftest.Report]()) {
		if !has(text, key) {
			t.Errorf("the manual lacks the key %s", key)
		}
	}
}

// TestExposure checks that the manual has every key of exposure --json and explain --json.
func TestExposure(t *testing.T) {
	man := page(t, "basicfw-agent.8")
	for command, typ := range map[string]reflect.Type{"exposure": reflect.TypeFor[exposure.Report](), "explain": reflect.TypeFor[exposure.Explanation]()} {
		for _, key := range keys(typ) {
			if !has(man["COMMANDS/"+command], key) {
				t.Errorf("the manual of %s lacks the key %s", command, key)
			}
		}
	}
}

// TestStatusLines checks that the manual has the label of every line of status.
func TestStatusLines(t *testing.T) {
	man := page(t, "basicfw-agent.8")
	screens, err := filepath.Glob("../cmd/basicfw-agent/testdata/status/*.txt")
	if err != nil || len(screens) == 0 {
		t.Fatalf("%q, %v", screens, err)
	}
	for _, screen := range screens {
		for _, line := range strings.Split(read(t, screen), "\n")[1:] {
			if label := strings.TrimSpace(line[:min(len(line), 13)]); label != "" && !regexp.MustCompile(`(?m)^`+label+`$`).MatchString(man["STATUS"]) {
				t.Errorf("the manual lacks the line %s", label)
			}
		}
	}
}

// keys returns the JSON keys of a type, at every depth.
func keys(typ reflect.Type) []string {
	switch {
	case typ == reflect.TypeFor[time.Time]():
		return nil
	case typ.Kind() == reflect.Slice || typ.Kind() == reflect.Pointer:
		return keys(typ.Elem())
	case typ.Kind() != reflect.Struct:
		return nil
	}
	var list []string
	for i := range typ.NumField() {
		f := typ.Field(i)
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		if name != "" && name != "-" {
			list = append(append(list, name), keys(f.Type)...)
		}
	}
	return list
}

// testExamples checks that the program accepts the examples and prints what they show.
func testExamples(t *testing.T, binary string) {
	root := t.TempDir()
	dir := filepath.Join(root, "etc/basicfw/profiles.d")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	write := func(path, text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	_, text, _ := strings.Cut(page(t, "basicfw-profile.5")["EXAMPLE"], "[profile]")
	example, shown, ok := strings.Cut("[profile]"+text, "\n$ basicfw-agent profile show shop\n")
	if !ok {
		t.Fatal("basicfw-profile.5 has no example of profile show")
	}
	write(filepath.Join(dir, "shop.ini"), example)
	if got := run(t, binary, "--root", root, "profile", "show", "shop"); strings.TrimSpace(got) != strings.TrimSpace(shown) {
		t.Errorf("profile show prints\n%s\nthe manual has\n%s", got, shown)
	}
	write(filepath.Join(root, "etc/basicfw/agent.ini"), page(t, "basicfw-agent.ini.5")["EXAMPLE"])
	rules := run(t, binary, "--root", root, "render")
	for _, comment := range []string{"basicfw-smtp", "basicfw-media", "basicfw-metrics"} {
		if !strings.Contains(rules, comment) {
			t.Errorf("the example of basicfw-agent.ini.5 has no rule %s", comment)
		}
	}
}

// testRules checks that the manual explains the comment of every rule.
func testRules(t *testing.T, binary string) {
	man := page(t, "basicfw-agent.8")
	root := t.TempDir()
	for _, m := range regexp.MustCompile(`--comment (basicfw-[a-z-]+)`).FindAllStringSubmatch(run(t, binary, "--root", root, "render"), -1) {
		if m[1] != "basicfw-http" && m[1] != "basicfw-https" && !has(man["THE RULES"]+man["THE RULES/Published ports"], m[1]) {
			t.Errorf("the manual does not explain %s", m[1])
		}
	}
}

// TestAudit checks that the rules that audit.md names are in the manual.
func TestAudit(t *testing.T) {
	man := page(t, "basicfw-agent.8")
	names := regexp.MustCompile("`(basicfw-[a-z-]+)`").FindAllStringSubmatch(read(t, "audit.md"), -1)
	if len(names) < 5 {
		t.Errorf("only %d rules", len(names))
	}
	for _, m := range names {
		if !has(man["THE RULES"], m[1]) && m[1] != "basicfw-agent" {
			t.Errorf("the manual does not explain %s", m[1])
		}
	}
}

// TestPages checks that groff reports no warning about any page.
func TestPages(t *testing.T) {
	lab.NeedTools(t, "groff")
	pages, err := filepath.Glob("*.[58]")
	if err != nil || len(pages) != 3 {
		t.Fatalf("%q, %v", pages, err)
	}
	for _, p := range pages {
		if out, err := exec.Command("groff", "-man", "-ww", "-Tutf8", "-z", p).CombinedOutput(); err != nil || len(out) > 0 {
			t.Errorf("%s: %v\n%s", p, err, out)
		}
	}
}

// TestReadme checks that the README shows the status as the program prints it.
func TestReadme(t *testing.T) {
	const golden = "../cmd/basicfw-agent/testdata/status/protected.txt"
	if !strings.Contains(read(t, "../README.md"), "# basicfw-agent status\n"+read(t, golden)+"```") {
		t.Errorf("the status in README.md differs from %s: copy it from there", golden)
	}
}

// TestLinks checks that every link and every make target in the README and the
// documents here exists.
func TestLinks(t *testing.T) {
	files, err := filepath.Glob("*.md")
	if err != nil {
		t.Fatal(err)
	}
	decisions, err := filepath.Glob("decisions/*.md")
	if err != nil || len(decisions) == 0 {
		t.Fatalf("%q, %v", decisions, err)
	}
	makefile := read(t, "../Makefile")
	for _, f := range append(append(files, decisions...), "../README.md") {
		text := read(t, f)
		for _, m := range regexp.MustCompile(`\]\(([^)#]+)`).FindAllStringSubmatch(text, -1) {
			if strings.Contains(m[1], "://") {
				continue
			}
			if _, err := os.Stat(filepath.Join(filepath.Dir(f), m[1])); err != nil {
				t.Errorf("%s: %v", f, err)
			}
		}
		for _, m := range regexp.MustCompile("(?m)(?:`|^ *)make ([a-z0-9-]+)").FindAllStringSubmatch(text, -1) {
			if !strings.Contains(makefile, "\n"+m[1]+":") {
				t.Errorf("%s: make target %s does not exist", f, m[1])
			}
		}
	}
}
