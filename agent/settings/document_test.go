package settings

import (
	"fmt"
	"strings"
	"testing"
	"unicode"
)

// show returns a document as one line, for tables.
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
		{"a comment directly after = is a value", "[a]\nk =;v\n", "[a]:1 k=;v:2"},
		{"comments may contain any text", "[a]\n; k = ä\u00a0“ü” \\\nk = v\n", "[a]:1 k=v:3"},
		{"colon is no delimiter", "[a]\nk = fe80::2\n", "[a]:1 k=fe80::2:2"},
		{"backslash continues nothing", "[a]\nk = v\\\nl = w\n", `[a]:1 k=v\:2 l=w:3`},
		{"quotes are part of the value", "[a]\nk = \"v\"\nl = 'w'\nm = \"\"\n", `[a]:1 k="v":2 l='w':3 m="":4`},
		{"nothing is expanded", "[a]\nl = w\nk = %(l)s$HOME\n", "[a]:1 l=w:2 k=%(l)s$HOME:3"},
		{"= in a value", "[a]\nk = v=w\n", "[a]:1 k=v=w:2"},
		{"no section inherits", "[a]\nk = v\n[a.b]\nl = w\n", "[a]:1 k=v:2 [a.b]:3 l=w:4"},
		{"a section continues", "[a]\nk = v\n[b]\n[a]\nl = w\n", "[a]:1 k=v:2 l=w:5 [b]:3"},
		{"ini.v1's default section", "[DEFAULT]\nk = v\n[a]\n", "[DEFAULT]:1 k=v:2 [a]:3"},
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
		{"junk after ]", "[a]junk\nk = v\n", `f:1: "[a]junk": only white space and a comment may follow the "]"`, ""},
		{"comment directly after ]", "[a];c\n", `f:1: "[a];c": only white space`, ""},
		{"two ]", "[a]]\n", `f:1: "[a]]": only white space`, ""},
		{"unclosed section", "[a\nk = v\n", `f:1: "[a": a section is written [NAME]`, ""},
		{"nameless section", "[]\n", `f:1: "[]": want a section name`, ""},
		{"white space in a section name", "[ a ]\n", `f:1: "[ a ]": want a section name`, ""},
		{"no =", "[a]\nk\nl = w\n", `f:2: "k": want KEY = VALUE, [SECTION], or a comment after ";"`, "[a]:1 l=w:3"},
		{"colon for =", "[a]\nk: v\n", `f:2: "k: v": want KEY = VALUE`, "[a]:1"},
		{"no key", "[a]\n= v\n", `f:2: "= v": want a name of letters`, "[a]:1"},
		{"white space in a key", "[a]\nk l = v\n", `f:2: "k l = v": want a name`, "[a]:1"},
		{"quoted key", "[a]\n\"k\" = v\n", `f:2: "\"k\" = v": want a name`, "[a]:1"},
		{"numbered key", "[a]\n- = v\n", `f:2: "- = v": want a name`, "[a]:1"},
		{"long key", "[a]\n" + strings.Repeat("k", 65) + " = v\n", `"...: want a name`, "[a]:1"},
		{"before any section", "k = v\n[a]\n", `f:1: k: key before the first [SECTION]`, "[a]:2"},
		{"twice", "[a]\nk = v\nk = v\n", "f:3: a.k: duplicate key, first set in line 2", "[a]:1 k=v:2"},
		{"twice, in a repeated section", "[a]\nk = v\n[b]\n[a]\nk =\n", "f:5: a.k: duplicate key, first set in line 2", "[a]:1 k=v:2 [b]:3"},
		{"NUL", "[a]\nk = v\x00\n", "f:2: control character (U+0000)", "[a]:1"},
		{"escape in a comment", "; \x1b[2J\n[a]\n", "f:1: control character (U+001B)", "[a]:2"},
		{"C1", "[a]\nk = \u0085v\n", "f:2: control character (U+0085)", "[a]:1"},
		{"CR within a line", "[a]\rk = v\n", "f:1: control character (U+000D)", ""},
		{"not UTF-8", "[a]\nk = \xff\nl = w\n", "f:2: not UTF-8", "[a]:1 l=w:3"},
		{"UTF-16", "\xff\xfe[\x00a\x00]\x00\n\x00", "f:1: not UTF-8\nf:2: control character (U+0000)", ""},
		{"invisible", "[a]\nk = v\u202ew\n", `f:2: a.k: "v\u202ew" contains an invisible character (U+202E)`, "[a]:1"},
		{"no-break space", "[a]\nk =\u00a0v\n", `f:2: a.k: "\u00a0v" contains an invisible character (U+00A0)`, "[a]:1"},
		{"byte order mark in the middle", "[a]\n\ufeffk = v\n", `f:2: "\ufeffk = v": want a name`, "[a]:1"},
		{"backtick", "[a]\nk = `v\nl = w`\n", "f:2: a.k: \"`v\": values are not quoted", "[a]:1 l=w`:3"},
		{"three quotes", "[a]\nk = \"\"\"v\nl = w\n", `f:2: a.k: "\"\"\"v": values are not quoted`, "[a]:1 l=w:3"},
		{"all at once", "k = v\n[a\n[b]x\n[c]\nk\n", "f:1: k: key before\nf:2: \"[a\": a section\nf:3: \"[b]x\": only\nf:5: \"k\": want", "[c]:4"},
		{"too many", "[a]\n" + manyKeys(maxEntries), "f:4097: more than 4096 settings", ""},
		{"too large", strings.Repeat("; comment\n", MaxSize/10+1), "f:1: file is larger than 1048576 bytes", ""},
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

// wantLines fails unless each line of the error begins with that line of want, or
// contains it if it names no file.
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

func TestErrorsAreLimited(t *testing.T) {
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
				// ini.v1 read the value literally.
				line := strings.ReplaceAll(lines[k.Line-1], "\t", " ")
				if !strings.Contains(line, k.Name) || !strings.Contains(line, k.Value) {
					t.Errorf("%s = %q differs from line %d: %q", k.Name, k.Value, k.Line, line)
				}
				_, rest, _ := strings.Cut(line, "=")
				if text, _ := splitComment("k=" + strings.TrimSuffix(rest, "\r")); strings.TrimSpace(text[2:]) != k.Value {
					t.Errorf("%q became %q", line, k.Value)
				}
			}
		}
	})
}
