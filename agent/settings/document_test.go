package settings

import (
	"fmt"
	"strings"
	"testing"
	"unicode"
)

// show gives a document in one line, so that a table can hold it.
func show(doc *Document) string {
	var words []string
	for _, s := range doc.Sections {
		words = append(words, fmt.Sprintf("[%s]:%d", s.Name, s.Line))
		for _, k := range s.Keys {
			words = append(words, fmt.Sprintf("%s=%s:%d", k.Name, k.Value, k.Line))
		}
	}
	return strings.Join(words, " ")
}

func TestParse(t *testing.T) {
	for _, tt := range []struct{ name, in, want string }{
		{"nothing", "", ""},
		{"blank", "\n \t\n\r\n", ""},
		{"plain", "[a]\nk = v\n", "[a]:1 k=v:2"},
		{"no newline at the end", "[a]\nk=v", "[a]:1 k=v:2"},
		{"empty value", "[a]\nk=\nl =  \t\nm = ; none", "[a]:1 k=:2 l=:3 m=:4"},
		{"white space", " [a] \t\n\t k \t=\t v\tw  \n", "[a]:1 k=v w:2"},
		{"CR LF", "[a]\r\nk = v\r\n", "[a]:1 k=v:2"},
		{"byte order mark", "\ufeff[a]\nk = v\n", "[a]:1 k=v:2"},
		{"comments", "; one\n # two\n[a] ; three\nk = v # four\n\nl = w\t;five ;six #seven\n", "[a]:3 k=v:4 l=w:6"},
		{"no comment without white space", "[a]\nk = 80#443;1\n", "[a]:1 k=80#443;1:2"},
		{"a comment at once behind the = is a value", "[a]\nk =;v\n", "[a]:1 k=;v:2"},
		{"comments may hold anything that is text", "[a]\n; k = ä\u00a0“ü” \\\nk = v\n", "[a]:1 k=v:3"},
		{"colon is no delimiter", "[a]\nk = fe80::2\n", "[a]:1 k=fe80::2:2"},
		{"backslash continues nothing", "[a]\nk = v\\\nl = w\n", `[a]:1 k=v\:2 l=w:3`},
		{"quotes are part of the value", "[a]\nk = \"v\"\nl = 'w'\nm = \"\"\n", `[a]:1 k="v":2 l='w':3 m="":4`},
		{"nothing is expanded", "[a]\nl = w\nk = %(l)s$HOME\n", "[a]:1 l=w:2 k=%(l)s$HOME:3"},
		{"= in a value", "[a]\nk = v=w\n", "[a]:1 k=v=w:2"},
		{"no section inherits", "[a]\nk = v\n[a.b]\nl = w\n", "[a]:1 k=v:2 [a.b]:3 l=w:4"},
		{"a section goes on", "[a]\nk = v\n[b]\n[a]\nl = w\n", "[a]:1 k=v:2 l=w:5 [b]:3"},
		{"ini.v1's own section", "[DEFAULT]\nk = v\n[a]\n", "[DEFAULT]:1 k=v:2 [a]:3"},
		{"names keep their case", "[A]\nK = v\nk = w\n", "[A]:1 K=v:2 k=w:3"},
		{"the same key in two sections", "[a]\nb.k = v\n[a.b]\nk = w\n", "[a]:1 b.k=v:2 [a.b]:3 k=w:4"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			doc, errs := Parse("f", []byte(tt.in))
			if errs != nil {
				t.Fatal(errs)
			}
			if got := show(doc); got != tt.want {
				t.Errorf("got %s, want %s", got, tt.want)
			}
		})
	}
}

func TestParseErrors(t *testing.T) {
	for _, tt := range []struct{ name, in, want, doc string }{
		{"junk behind ]", "[a]junk\nk = v\n", `f:1: "[a]junk": behind the "]" may be a comment, with white space before it, and nothing else`, ""},
		{"comment sticking to ]", "[a];c\n", `f:1: "[a];c": behind the "]"`, ""},
		{"two ]", "[a]]\n", `f:1: "[a]]": behind the "]"`, ""},
		{"unclosed section", "[a\nk = v\n", `f:1: "[a": a section is written [NAME]`, ""},
		{"nameless section", "[]\n", `f:1: "[]": want a section's name`, ""},
		{"white space in a section's name", "[ a ]\n", `f:1: "[ a ]": want a section's name`, ""},
		{"no =", "[a]\nk\nl = w\n", `f:2: "k": want KEY = VALUE, [SECTION], or a comment behind a ";"`, "[a]:1 l=w:3"},
		{"colon for =", "[a]\nk: v\n", `f:2: "k: v": want KEY = VALUE`, "[a]:1"},
		{"no key", "[a]\n= v\n", `f:2: "= v": want a name of letters`, "[a]:1"},
		{"white space in a key", "[a]\nk l = v\n", `f:2: "k l = v": want a name`, "[a]:1"},
		{"quoted key", "[a]\n\"k\" = v\n", `f:2: "\"k\" = v": want a name`, "[a]:1"},
		{"numbered key", "[a]\n- = v\n", `f:2: "- = v": want a name`, "[a]:1"},
		{"long key", "[a]\n" + strings.Repeat("k", 65) + " = v\n", `"...: want a name`, "[a]:1"},
		{"before any section", "k = v\n[a]\n", `f:1: k: it stands before any [SECTION]`, "[a]:2"},
		{"twice", "[a]\nk = v\nk = v\n", "f:3: a.k: it is given twice, in line 2 too: want it once", "[a]:1 k=v:2"},
		{"twice, in a section that goes on", "[a]\nk = v\n[b]\n[a]\nk =\n", "f:5: a.k: it is given twice, in line 2 too", "[a]:1 k=v:2 [b]:3"},
		{"NUL", "[a]\nk = v\x00\n", "f:2: there is a control character (U+0000)", "[a]:1"},
		{"escape in a comment", "; \x1b[2J\n[a]\n", "f:1: there is a control character (U+001B)", "[a]:2"},
		{"C1", "[a]\nk = \u0085v\n", "f:2: there is a control character (U+0085)", "[a]:1"},
		{"CR within a line", "[a]\rk = v\n", "f:1: there is a control character (U+000D)", ""},
		{"not UTF-8", "[a]\nk = \xff\nl = w\n", "f:2: this is not UTF-8", "[a]:1 l=w:3"},
		{"UTF-16", "\xff\xfe[\x00a\x00]\x00\n\x00", "f:1: this is not UTF-8\nf:2: there is a control character (U+0000)", ""},
		{"invisible", "[a]\nk = v\u202ew\n", `f:2: a.k: "v\u202ew" holds a character that does not show (U+202E)`, "[a]:1"},
		{"no-break space", "[a]\nk =\u00a0v\n", `f:2: a.k: "\u00a0v" holds a character that does not show (U+00A0)`, "[a]:1"},
		{"byte order mark in the middle", "[a]\n\ufeffk = v\n", `f:2: "\ufeffk = v": want a name`, "[a]:1"},
		{"backtick", "[a]\nk = `v\nl = w`\n", "f:2: a.k: \"`v\": a value has no quotes", "[a]:1 l=w`:3"},
		{"three quotes", "[a]\nk = \"\"\"v\nl = w\n", `f:2: a.k: "\"\"\"v": a value has no quotes`, "[a]:1 l=w:3"},
		{"all at once", "k = v\n[a\n[b]x\n[c]\nk\n", "f:1: k: it stands\nf:2: \"[a\": a section\nf:3: \"[b]x\": behind\nf:5: \"k\": want", "[c]:4"},
		{"too many", "[a]\n" + manyKeys(maxEntries), "f:4097: more than 4096 settings", ""},
		{"too large", strings.Repeat("; comment\n", MaxSize/10+1), "f:1: the file is larger than 1048576 bytes", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			doc, errs := Parse("f", []byte(tt.in))
			wantLines(t, errs.Err(), tt.want)
			if got := show(doc); tt.name != "too many" && got != tt.doc {
				t.Errorf("got %s, want %s", got, tt.doc)
			}
		})
	}
}

func manyKeys(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "k%d = v\n", i)
	}
	return b.String()
}

// wantLines wants an error whose lines begin with those of want, or hold them
// where they name no file.
func wantLines(t *testing.T, err error, want string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, want %s", want)
	}
	got, lines := strings.Split(err.Error(), "\n"), strings.Split(want, "\n")
	if len(got) != len(lines) {
		t.Fatalf("got %d errors:\n%v\nwant %d:\n%s", len(got), err, len(lines), want)
	}
	for i, w := range lines {
		if !strings.Contains(got[i], w) || !strings.HasPrefix(w, `"`) && !strings.HasPrefix(got[i], w) {
			t.Errorf("got  %s\nwant %s", got[i], w)
		}
	}
}

func TestErrorsShowsNotEverything(t *testing.T) {
	_, errs := Parse("f", []byte(strings.Repeat("junk\n", 1000)))
	if len(errs) != 1000 {
		t.Errorf("got %d errors, want 1000", len(errs))
	}
	text := errs.Error()
	if n := strings.Count(text, "\n"); n != maxShown || !strings.HasSuffix(text, "\nand 900 more") {
		t.Errorf("got %d lines: %s", n+1, text)
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"[a]\nk = v\n", "[a]x\n-=1\nk=`v\n", "\ufeff[a]\r\nk = v ; c\r\n[a.b]\n[a]\nk=w", "[DEFAULT]\nk=%(k)s\\\n"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		doc, errs := Parse("f", data)
		for _, p := range errs {
			if p.Line < 1 || strings.ContainsFunc(p.String(), unicode.IsControl) || len(p.String()) > 1000 {
				t.Errorf("problem %q in line %d", p.String(), p.Line)
			}
		}
		lines := strings.Split(string(data), "\n")
		for _, s := range doc.Sections {
			for _, k := range s.Keys {
				if strings.ContainsFunc(k.Value, func(r rune) bool { return !unicode.IsPrint(r) }) || strings.TrimSpace(k.Value) != k.Value {
					t.Errorf("value %q", k.Value)
				}
				// ini.v1 read what stands there, to the letter.
				line := strings.ReplaceAll(lines[k.Line-1], "\t", " ")
				if !strings.Contains(line, k.Name) || !strings.Contains(line, k.Value) {
					t.Errorf("%s = %q is not what line %d says: %q", k.Name, k.Value, k.Line, line)
				}
				_, rest, _ := strings.Cut(line, "=")
				if text, _ := splitComment("k=" + strings.TrimSuffix(rest, "\r")); strings.TrimSpace(text[2:]) != k.Value {
					t.Errorf("%q became %q", line, k.Value)
				}
			}
		}
	})
}
