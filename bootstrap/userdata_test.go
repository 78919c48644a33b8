package bootstrap

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"math/rand"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/basicfw/basicfw-agent/agent/system"
	"github.com/basicfw/basicfw-agent/test/lab"
)

const (
	testRPM = "https://example.com/basicfw-agent-0.1.0-1.x86_64.rpm"
	testSum = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
)

// TestExamples: what lies in examples is what is printed, and then the owner's
// own part.
func TestExamples(t *testing.T) {
	for _, profile := range []string{"web-only", "web+mail"} {
		want, err := UserData(UserDataOptions{RPMURL: testRPM, ClientIP: "203.0.113.7", Profile: profile})
		if err != nil {
			t.Fatal(err)
		}
		example := "examples/" + profile + ".yaml"
		got, err := os.ReadFile(example)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.HasPrefix(got, want) {
			t.Errorf("%s does not begin with what is printed:\n%s", example, want)
		}
		checkSchema(t, example)
	}
}

func TestPrinted(t *testing.T) {
	for name, tt := range map[string]struct {
		o    UserDataOptions
		want []string // lines
	}{
		"nothing but the package": {UserDataOptions{RPMURL: testRPM}, []string{"rpm='" + testRPM + "'", "sha256=''", "set -- "}},
		"everything": {
			UserDataOptions{RPMURL: "http://[2001:db8::1]:8080/a.rpm?b=c&d=(1)$;", SHA256: " " + strings.ToUpper(testSum) + "\n", KeyURL: "https://example.com/key",
				ClientIP: " 203.0.113.7,\n2001:db8::/64\n", Profile: "web+mail"},
			[]string{"rpm='http://[2001:db8::1]:8080/a.rpm?b=c&d=(1)$;'", "sha256='" + testSum + "'",
				"set -- --profile web+mail --client-ip 203.0.113.7,2001:db8::/64", `fetch 'https://example.com/key' "$dir/key" && rpm --dbpath "$dir/db" --import "$dir/key" || return`},
		},
		"profile = auto is bootstrap's own choice": {UserDataOptions{RPMURL: testRPM, Profile: "auto"}, []string{"set -- "}},
	} {
		t.Run(name, func(t *testing.T) {
			data, err := UserData(tt.o)
			if err != nil {
				t.Fatal(err)
			}
			for _, line := range tt.want {
				if !strings.Contains(string(data), "\n      "+line+"\n") && !strings.Contains(string(data), "\n        "+line+"\n") {
					t.Errorf("no line %q in\n%s", line, data)
				}
			}
			if len(data) > 16<<10 {
				t.Errorf("%d bytes are more than some clouds take", len(data))
			}
			for _, jinja := range []string{"{{", "{%", "{#"} {
				if bytes.Contains(data, []byte(jinja)) {
					t.Errorf("jinja would take %q for an instruction", jinja)
				}
			}
			p := filepath.Join(t.TempDir(), "user-data")
			if err := os.WriteFile(p, data, 0o600); err != nil {
				t.Fatal(err)
			}
			checkSchema(t, p)
		})
	}
}

func checkSchema(t *testing.T, path string) {
	t.Helper()
	lab.NeedTools(t, "/usr/bin/cloud-init")
	if _, err := (&system.System{}).Run(context.Background(), system.Command{Name: "cloud-init", Args: []string{"schema", "--config-file", path}}); err != nil {
		t.Error(err)
	}
}

func TestUserDataRefuses(t *testing.T) {
	for name, tt := range map[string]struct {
		o    UserDataOptions
		want []string
	}{
		"no package":           {UserDataOptions{}, []string{"--rpm: where is it?"}},
		"a file":               {UserDataOptions{RPMURL: "/tmp/a.rpm"}, []string{"is not a URL"}},
		"another scheme":       {UserDataOptions{RPMURL: "ftp://example.com/a.rpm", SHA256: testSum}, []string{"is not a URL"}},
		"no host":              {UserDataOptions{RPMURL: "https:///a.rpm"}, []string{"is not a URL"}},
		"http, unchecked":      {UserDataOptions{RPMURL: "http://example.com/a.rpm"}, []string{"--sha256"}},
		"http for the key":     {UserDataOptions{RPMURL: testRPM, SHA256: testSum, KeyURL: "http://example.com/key"}, []string{"--gpg-key"}},
		"a password":           {UserDataOptions{RPMURL: "https://me:secret@example.com/a.rpm"}, []string{"password"}},
		"a quote":              {UserDataOptions{RPMURL: "https://example.com/a'$(reboot)'.rpm"}, []string{"is not a URL"}},
		"white space":          {UserDataOptions{RPMURL: "https://example.com/a.rpm\nruncmd: [reboot]"}, []string{"is not a URL"}},
		"a brace":              {UserDataOptions{RPMURL: "https://example.com/{{v1.region}}.rpm"}, []string{"is not a URL"}},
		"a fragment":           {UserDataOptions{RPMURL: testRPM + "#x"}, []string{"is not a URL"}},
		"endless":              {UserDataOptions{RPMURL: testRPM + strings.Repeat("x", 2000)}, []string{"longer"}},
		"half a checksum":      {UserDataOptions{RPMURL: testRPM, SHA256: testSum[:40]}, []string{"--sha256", "64 hexadecimal digits"}},
		"no hex":               {UserDataOptions{RPMURL: testRPM, SHA256: strings.Repeat("g", 64)}, []string{"--sha256"}},
		"a name as client":     {UserDataOptions{RPMURL: testRPM, ClientIP: "office.example.com"}, []string{"--client-ip", "names are not looked up"}},
		"everybody as client":  {UserDataOptions{RPMURL: testRPM, ClientIP: "0.0.0.0/0"}, []string{"--client-ip"}},
		"jinja that is missed": {UserDataOptions{RPMURL: testRPM, ClientIP: "CI_MISSING_JINJA_VAR/ip"}, []string{"template variable"}},
		"no profile's name":    {UserDataOptions{RPMURL: testRPM, Profile: "web; reboot"}, []string{"--profile"}},
		"everything at once": {UserDataOptions{RPMURL: "x", SHA256: "y", KeyURL: "z", ClientIP: "a,b", Profile: "C"},
			[]string{"--rpm", "--sha256", "--gpg-key", `"a"`, `"b"`, "--profile"}},
	} {
		data, err := UserData(tt.o)
		var invalid *InvalidError
		if !errors.As(err, &invalid) || data != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		for _, want := range tt.want {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%s: the error says nothing of %q: %v", name, want, err)
			}
		}
	}
}

// values are where the options stand in what is printed; everything else is
// the same for all.
var values = regexp.MustCompile(`(?m)^      (rpm=|sha256=|set -- |  fetch ')([^\n]*)$`)

// FuzzUserData: whatever the options, what is accepted changes nothing but the
// lines that are meant for it, and ends there.
func FuzzUserData(f *testing.F) {
	f.Add(testRPM, testSum, "", "203.0.113.7", "web-only")
	f.Add("http://example.com/'\"$`\\a.rpm", testSum, "https://k/", "::1,2001:db8::/64\n", "web+mail")
	f.Add("https://example.com/%0a%27?a='", "", "https://k/'", "1.2.3.4\n- reboot", "a\nb")
	f.Add("https://é.example/ ", "", "https://k/\x00", "fe80::1%eth0", "--")
	plain := map[bool]string{}
	for _, key := range []bool{false, true} {
		o := UserDataOptions{RPMURL: testRPM}
		if key {
			o.KeyURL = testRPM
		}
		data, err := UserData(o)
		if err != nil {
			f.Fatal(err)
		}
		plain[key] = values.ReplaceAllString(string(data), "$1")
	}
	safe := regexp.MustCompile(`^(rpm='[!$&(-;=?-Z\[\]_a-z~%]*'|sha256='([0-9a-f]{64})?'|set -- [a-z0-9+._,:/ -]*|  fetch 'https://[!$&(-;=?-Z\[\]_a-z~%]*' "\$dir/key".*)$`)
	f.Fuzz(func(t *testing.T, rpm, sum, key, client, profile string) {
		data, err := UserData(UserDataOptions{RPMURL: rpm, SHA256: sum, KeyURL: key, ClientIP: client, Profile: profile})
		if err != nil {
			if data != nil {
				t.Error("both user-data and an error")
			}
			return
		}
		if got := values.ReplaceAllString(string(data), "$1"); got != plain[key != ""] {
			t.Errorf("more than the values changed:\n%s", data)
		}
		for _, line := range values.FindAllString(string(data), -1) {
			if !safe.MatchString(strings.TrimPrefix(line, "      ")) {
				t.Errorf("the line %q", line)
			}
		}
	})
}

// TestRoundTrip: a real YAML parser and a real shell get out what went in.
func TestRoundTrip(t *testing.T) {
	lab.NeedTools(t, "/usr/bin/python3", "/usr/lib/python3/dist-packages/yaml/__init__.py")
	type round struct {
		UserData string
		Want     []string
	}
	var rounds []round
	r := rand.New(rand.NewSource(1))
	const chars = "aZ09-._~:/?[]@!$&()*+,;=%'\" \\`#{}|<>^\n\té"
	for range 20000 {
		tail := make([]byte, r.Intn(12))
		for i := range tail {
			tail[i] = chars[r.Intn(len(chars))]
		}
		rpm := "https://example.com/" + string(tail)
		profile := []string{"web-only", "web+mail", "a.b_c"}[r.Intn(3)]
		data, err := UserData(UserDataOptions{RPMURL: rpm, SHA256: testSum, ClientIP: "203.0.113.7 2001:db8::/64", Profile: profile})
		if err != nil {
			continue
		}
		if rounds = append(rounds, round{string(data), []string{rpm, testSum, "--profile", profile, "--client-ip", "203.0.113.7,2001:db8::/64"}}); len(rounds) == 200 {
			break
		}
	}
	if len(rounds) < 50 {
		t.Fatalf("only %d of them were accepted", len(rounds))
	}
	in, err := json.Marshal(rounds)
	if err != nil {
		t.Fatal(err)
	}
	const program = `
import json, subprocess, sys, yaml
for r in json.load(sys.stdin):
    doc = yaml.safe_load(r["UserData"])
    assert sorted(doc) == ["bootcmd", "runcmd"], doc
    assert doc["bootcmd"][0][:5] == ["cloud-init-per", "instance", "basicfw", "sh", "-c"] and len(doc["bootcmd"]) == 2, doc
    assert doc["runcmd"] == doc["bootcmd"][1:], doc
    script = doc["runcmd"][0]
    assert script[:2] == ["sh", "-c"] and len(script) == 3, script
    head = script[2].split("console()")[0].replace("[ -e", ": [ -e")
    out = subprocess.run(["sh", "-c", head + "printf '%s\\n' \"$rpm\" \"$sha256\" \"$@\""], capture_output=True, text=True, check=True).stdout
    assert out == "".join(w + "\n" for w in r["Want"]), (out, r["Want"])
print("fine")
`
	res, err := (&system.System{}).Run(context.Background(), system.Command{Name: "/usr/bin/python3", Args: []string{"-c", program}, Stdin: in})
	if err != nil || string(res.Stdout) != "fine\n" {
		t.Errorf("%s %v", res.Stdout, err)
	}
}
