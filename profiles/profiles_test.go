package profiles

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode"

	"github.com/google/go-cmp/cmp"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/settings"
	"github.com/basicfw/basicfw-agent/agent/system"
)

// machine returns a system whose profiles.d has these files.
func machine(t *testing.T, files map[string]string) *system.System {
	t.Helper()
	root := t.TempDir()
	for name, text := range files {
		p := filepath.Join(root, Dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return &system.System{Root: root}
}

// show returns a profile in one line.
func show(p firewall.Profile) string {
	s := fmt.Sprintf("%s %q ping=%v", p.Name, p.Title, p.Ping)
	for _, o := range p.Services {
		s += fmt.Sprintf("; %s %s (%s)", o.Name, o, strings.TrimPrefix(strings.TrimPrefix(o.Source, "profile "), Dir+"/"))
	}
	return s
}

func TestBuiltIn(t *testing.T) {
	set, err := Load(machine(t, nil))
	if err != nil {
		t.Fatal(err)
	}
	const web = "; http 80/tcp (web-only); https 443/tcp (web-only)"
	const webMail = `web+mail "Web and mail server" ping=true` + web +
		"; smtp 25/tcp (web+mail); smtps 465/tcp (web+mail); pop3 110/tcp (web+mail)" +
		"; pop3s 995/tcp (web+mail); imap 143/tcp (web+mail); imaps 993/tcp (web+mail)"
	for name, want := range map[string]string{
		"web-only": `web-only "Web server" ping=true` + web,
		"web+mail": webMail,
		"web-mail": webMail,
	} {
		got, source, err := set.Get(name)
		if err != nil || source != BuiltIn || show(got) != want {
			t.Errorf("%s: %v, %s\ngot  %s\nwant %s", name, err, source, show(got), want)
		}
	}
	if _, _, err := set.Get("mail\n"); err == nil || err.Error() != `unknown profile "mail\n": want one of web+mail, web-only` {
		t.Errorf("got %v", err)
	}
	want := []Entry{{"web+mail", "Web and mail server", BuiltIn}, {"web-only", "Web server", BuiltIn}}
	if diff := cmp.Diff(want, set.List()); diff != "" {
		t.Error(diff)
	}
}

func TestFiles(t *testing.T) {
	set, err := Load(machine(t, map[string]string{
		"web-only.ini": "[profile]\nname = web-only\ntitle = My web\nping = no\n[open]\nhttps = 443/tcp\n",
		"db.ini": `; a database beside the web server
[profile]
name    = db
extends = web-mail
ping    =
[open]
pg      = 5432/tcp on private from 10.0.0.0/8
imap    = 143/tcp on private
smtp    =
`,
		"bare.ini":          "[profile]\nname = bare\n",
		"web-mail.ini~":     "junk",
		".#web+mail.ini":    "junk",
		"db.ini.rpmnew":     "junk",
		"README":            "junk",
		"more/of_these.ini": "junk",
	}))
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"web-only": `web-only "My web" ping=false; https 443/tcp (web-only.ini:6)`,
		"bare":     `bare "" ping=true`,
		"db": `db "" ping=true; https 443/tcp (web-only.ini:6); smtp 25/tcp (web+mail); smtps 465/tcp (web+mail); pop3 110/tcp (web+mail)` +
			"; pop3s 995/tcp (web+mail); imap 143/tcp on private (db.ini:8); imaps 993/tcp (web+mail); pg 5432/tcp on private from 10.0.0.0/8 (db.ini:7)",
	} {
		got, source, err := set.Get(name)
		if err != nil || source != Dir+"/"+name+".ini" || show(got) != want {
			t.Errorf("%s: %v, %s\ngot  %s\nwant %s", name, err, source, show(got), want)
		}
	}
	want := []Entry{
		{"bare", "", Dir + "/bare.ini"}, {"db", "", Dir + "/db.ini"},
		{"web+mail", "Web and mail server", BuiltIn}, {"web-only", "My web", Dir + "/web-only.ini"},
	}
	if diff := cmp.Diff(want, set.List()); diff != "" {
		t.Error(diff)
	}
	// A caller cannot change the set's profiles.
	p, _, _ := set.Get("db")
	p.Services[0].From = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}
	if p, _, _ := set.Get("db"); p.Services[0].From != nil {
		t.Error("a caller changed a profile of the set")
	}
}

func TestPingIsInherited(t *testing.T) {
	set, err := Load(machine(t, map[string]string{
		"a.ini": "[profile]\nname = a\nping = no\n",
		"b.ini": "[profile]\nname = b\nextends = a\n",
		"c.ini": "[profile]\nname = c\nextends = b\nping = yes\n",
	}))
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]bool{"a": false, "b": false, "c": true} {
		if p, _, err := set.Get(name); err != nil || p.Ping != want {
			t.Errorf("%s: ping %v, %v", name, p.Ping, err)
		}
	}
}

// wantLines checks that the lines of an error begin with those of want.
func wantLines(t *testing.T, err error, want ...string) {
	t.Helper()
	var errs settings.Errors
	if !errors.As(err, &errs) {
		t.Fatalf("got %v, want settings.Errors", err)
	}
	got := strings.Split(err.Error(), "\n")
	for i := range max(len(got), len(want)) {
		if i >= len(got) || i >= len(want) || !strings.HasPrefix(got[i], want[i]) {
			t.Fatalf("got\n%v\nwant\n%s", err, strings.Join(want, "\n"))
		}
	}
}

func TestErrors(t *testing.T) {
	_, err := Load(machine(t, map[string]string{
		"a.ini": "[profile]\nname = a\nextends = b\n",
		"b.ini": "[profile]\nname = b\nextends = c\n",
		"c.ini": "[profile]\nname = c\nextends = a\n",
		"d.ini": "[profile]\nname = d\nextends = a\n", // leads into their cycle, but is not part of it
		"e.ini": "[profile]\nname = e\nextends = e\n",
		"f.ini": "[profile]\nname = g\nextends = nobody\ntitle = " + strings.Repeat("x", 61) + "\nping = 1\ncolour = red\njunk\n" +
			"[open]\nssh = 22/tcp\nweb = 8080\nbad = 0/tcp on lan\nbad = 1/tcp\n[log]\n",
		"g.ini/x":      "",
		"h.ini":        "",
		"i.ini":        "[profile]\nname =\n",
		"J.ini":        "[profile]\nname = j\n",
		"auto.ini":     "[profile]\nname = auto\n",
		"web-mail.ini": "[profile]\nname = web-mail\n",
		"web+mail.ini": "[profile]\nname = web+mail\nextends = web+mail\n",
		"z.ini":        "\x00",
	}))
	wantLines(t, err,
		Dir+`/J.ini:1: profile name "J": want 1 to 40 of a-z`,
		Dir+`/J.ini:2: profile.name: "j" does not match the file name "J.ini"`,
		Dir+`/a.ini:3: profile.extends: circular reference: a -> b -> c -> a`,
		Dir+`/auto.ini:1: profile name "auto": reserved for automatic selection`,
		Dir+`/b.ini:3: profile.extends: circular reference: b -> c -> a -> b`,
		Dir+`/c.ini:3: profile.extends: circular reference: c -> a -> b -> c`,
		Dir+`/e.ini:3: profile.extends: circular reference: e -> e`,
		Dir+`/f.ini:2: profile.name: "g" does not match the file name "f.ini"`,
		Dir+`/f.ini:3: profile.extends: unknown profile "nobody": want one of J, a, auto, b, c, d, e, f, g, h, i, web+mail, web-mail, web-only, z`,
		Dir+`/f.ini:4: profile.title: "xxxx`,
		Dir+`/f.ini:5: profile.ping: "1": want yes or no`,
		Dir+`/f.ini:6: profile.colour: unknown key: [profile] has name, title, extends, ping`,
		Dir+`/f.ini:7: "junk": want KEY = VALUE`,
		Dir+`/f.ini:9: open.ssh: service name "ssh" is reserved for the baseline rules`,
		Dir+`/f.ini:10: open.web: "8080": write 8080/tcp or 8080/udp`,
		Dir+`/f.ini:11: open.bad: "0/tcp": ports are 1 to 65535`,
		Dir+`/f.ini:11: open.bad: unknown zone "lan"`,
		Dir+`/f.ini:12: open.bad: duplicate key, first set in line 11`,
		Dir+`/f.ini:13: unknown section [log]: want [profile] or [open]`,
		Dir+`/g.ini: cannot be read: is a directory`,
		Dir+`/h.ini:1: profile.name: missing: want name = h in the section [profile]`,
		Dir+`/i.ini:1: profile.name: missing: want name = i in the section [profile]`,
		Dir+`/web+mail.ini:3: profile.extends: circular reference: web+mail -> web+mail`,
		Dir+`/web-mail.ini:1: web-mail is an alias of the built-in web+mail: to replace that, name the file web+mail.ini`,
		Dir+`/z.ini:1: control character (U+0000)`,
	)
}

func TestCheck(t *testing.T) {
	sys := machine(t, map[string]string{
		"base.ini":   "[profile]\nname = base\nextends = draft\n",
		"broken.ini": "junk",
	})
	dir := t.TempDir()
	write := func(name, text string) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return p
	}
	for _, text := range []string{
		"[profile]\nname = draft\nextends = web-only\n[open]\nalt = 8080/tcp\n",
		"[profile]\nname = draft\nextends = broken\n", // whose errors are its own
	} {
		if err := Check(sys, write("draft.ini", text)); err != nil {
			t.Errorf("%q: %v", text, err)
		}
	}
	draft := filepath.Join(dir, "draft.ini")
	for _, tt := range []struct{ path, want string }{
		{write("draft.ini", "[profile]\nname = draft\nextends = base\n[open]\nalt = 8080\n"),
			draft + ":3: profile.extends: circular reference: draft -> base -> draft\n" + draft + `:5: open.alt: "8080": write 8080/tcp`},
		{write("other.ini", "[profile]\nname = draft\n"), filepath.Join(dir, "other.ini") + `:2: profile.name: "draft" does not match the file name "other.ini"`},
		{write("draft.txt", "[profile]\nname = draft.txt\n"), filepath.Join(dir, "draft.txt") + `:1: file name "draft.txt": want NAME.ini`},
		{write(".ini", "[profile]\nname = x\n"), filepath.Join(dir, ".ini") + ":1: profile name \"\"\n" + filepath.Join(dir, ".ini") + ":2: profile.name"},
		{filepath.Join(dir, "none.ini"), filepath.Join(dir, "none.ini") + ": cannot be read: no such file or directory"},
		{Dir + "/broken.ini", Dir + `/broken.ini:1: "junk": want KEY = VALUE`},
	} {
		wantLines(t, Check(sys, tt.path), strings.Split(tt.want, "\n")...)
	}
}

// Only valid names and services are accepted from a profile's file.
func FuzzDecode(f *testing.F) {
	for _, name := range []string{WebOnly, WebMail} {
		data, err := builtIn.ReadFile(name + ".ini")
		if err != nil {
			f.Fatal(err)
		}
		f.Add(name+".ini", data)
	}
	f.Fuzz(func(t *testing.T, name string, data []byte) {
		doc, errs := settings.Parse(name, data)
		p, more := Decode(doc)
		for _, e := range append(errs, more...) {
			if e.Line < 1 || strings.ContainsFunc(e.String(), unicode.IsControl) {
				t.Errorf("problem %q", e.String())
			}
		}
		if len(errs)+len(more) > 0 {
			return
		}
		if firewall.CheckProfileName(p.Name) != nil {
			t.Errorf("accepted the name %q", p.Name)
		}
		files := map[string]File{p.Name: p}
		if set, errs := resolve(files); len(errs) == 0 {
			got, _, err := set.Get(p.Name)
			if err != nil || strings.ContainsFunc(show(got)+got.Title, unicode.IsControl) {
				t.Errorf("%v: %q", err, show(got))
			}
		}
	})
}
