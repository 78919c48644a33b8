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
	testRPM = "https://example.com/basicfw-agent-0.2.0-1.x86_64.rpm"
	testSum = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
)

// released returns the address of the package of the last release in the changelog.
func released(t *testing.T) string {
	t.Helper()
	log, err := os.ReadFile("../CHANGELOG.md")
	if err != nil {
		t.Fatal(err)
	}
	version := regexp.MustCompile(`(?m)^## (\d[.\d]*) `).FindSubmatch(log)
	if version == nil {
		t.Fatal("the changelog has no release")
	}
	return "https://example.com/basicfw-agent-" + string(version[1]) + "-1.x86_64.rpm"
}

// TestExamples checks that each example begins with the printed user-data for the last
// release.
func TestExamples(t *testing.T) {
	for _, profile := range []string{"web-only", "web+mail"} {
		want, err := UserData(UserDataOptions{RPMURL: released(t), ClientIP: "203.0.113.7", Profile: profile})
		if err != nil {
			t.Fatal(err)
		}
		example := "examples/" + profile + ".yaml"
		got, err := os.ReadFile(example)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.HasPrefix(got, want) {
			t.Errorf("%s does not begin with the printed user-data:\n%s", example, want)
		}
		checkSchema(t, example)
	}
}

func TestPrinted(t *testing.T) {
	for name, tt := range map[string]struct {
		o    UserDataOptions
		want []string // lines
	}{
		"only the package": {UserDataOptions{RPMURL: testRPM}, []string{"rpm='" + testRPM + "'", "sha256=''", "set -- "}},
		"everything": {
			UserDataOptions{RPMURL: "http://[2001:db8::1]:8080/a.rpm?b=c&d=(1)$;", SHA256: " " + strings.ToUpper(testSum) + "\n", KeyURL: "https://example.com/key",
				ClientIP: " 203.0.113.7,\n2001:db8::/64\n", Profile: "web+mail"},
			[]string{"rpm='http://[2001:db8::1]:8080/a.rpm?b=c&d=(1)$;'", "sha256='" + testSum + "'",
				"key='https://example.com/key'", "set -- --profile web+mail --client-ip 203.0.113.7,2001:db8::/64"},
		},
		"a repository": {
			UserDataOptions{RepoURL: "http://example.com/repo?a=b&c=$d", KeyURL: "https://example.com/key", ClientIP: "203.0.113.7"},
			[]string{"repo='http://example.com/repo?a=b&c=$d'", "key='https://example.com/key'", "set -- --client-ip 203.0.113.7"},
		},
		"a repository without a key":    {UserDataOptions{RepoURL: "https://example.com/repo"}, []string{"repo='https://example.com/repo'", "key=''", "set -- "}},
		"bootstrap chooses the profile": {UserDataOptions{RPMURL: testRPM, Profile: "auto"}, []string{"set -- "}},
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
				t.Errorf("%d bytes are more than some clouds accept", len(data))
			}
			for _, text := range []string{"{{", "{%", "{#", "${", "%{"} {
				if bytes.Contains(data, []byte(text)) {
					t.Errorf("it contains %q, which jinja or Terraform interprets", text)
				}
			}
			p := filepath.Join(t.TempDir(), "user-data")
			for _, text := range [][]byte{data, bytes.ReplaceAll(data, []byte("\n"), []byte("\r\n"))} {
				if err := os.WriteFile(p, text, 0o600); err != nil {
					t.Fatal(err)
				}
				checkSchema(t, p)
			}
			same(t, p, data)
		})
	}
}

// same checks that cloud-init reads from a file what it would read from data, although the
// file has other line ends, as a form in a browser sends them.
func same(t *testing.T, file string, data []byte) {
	t.Helper()
	lab.NeedTools(t, "/usr/bin/python3")
	const program = `
import sys
from cloudinit import handlers, util
got = open(sys.argv[1], newline="").read()
assert "\r\n" in got
assert handlers.type_from_starts_with(got) == "text/cloud-config", got[:30]
assert util.load_yaml(got) == util.load_yaml(sys.stdin.read())
`
	if _, err := (&system.System{}).Run(context.Background(), system.Command{Name: "/usr/bin/python3", Args: []string{"-c", program, file}, Stdin: data}); err != nil {
		t.Error(err)
	}
}

// TestTerraform checks that a template and a heredoc of Terraform leave the user-data as it is.
func TestTerraform(t *testing.T) {
	lab.NeedTools(t, "terraform")
	data, err := UserData(UserDataOptions{RPMURL: testRPM + "?a=$b", SHA256: testSum, KeyURL: "https://example.com/key", ClientIP: "203.0.113.7"})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for name, text := range map[string]string{"user-data": string(data), "main.tf": "output \"file\" {\n  value = templatefile(\"user-data\", {})\n}\n" +
		"output \"heredoc\" {\n  value = <<EOT\n" + string(data) + "EOT\n}\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	run := func(args ...string) string {
		t.Helper()
		res, err := (&system.System{}).Run(context.Background(), system.Command{Name: "terraform", Args: append([]string{"-chdir=" + dir}, args...)})
		if err != nil {
			t.Fatalf("%v\n%s%s", err, res.Stdout, res.Stderr)
		}
		return string(res.Stdout)
	}
	run("init", "-no-color")
	run("apply", "-no-color", "-auto-approve")
	for _, name := range []string{"file", "heredoc"} {
		var got string
		if err := json.Unmarshal([]byte(run("output", "-json", name)), &got); err != nil || got != string(data) {
			t.Errorf("%s: %v\n%s", name, err, got)
		}
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
		"no package":                     {UserDataOptions{}, []string{"--rpm: missing"}},
		"a file":                         {UserDataOptions{RPMURL: "/tmp/a.rpm"}, []string{"is not a URL"}},
		"another scheme":                 {UserDataOptions{RPMURL: "ftp://example.com/a.rpm", SHA256: testSum}, []string{"is not a URL"}},
		"no host":                        {UserDataOptions{RPMURL: "https:///a.rpm"}, []string{"is not a URL"}},
		"http, no checksum":              {UserDataOptions{RPMURL: "http://example.com/a.rpm"}, []string{"--sha256"}},
		"http for the key":               {UserDataOptions{RPMURL: testRPM, SHA256: testSum, KeyURL: "http://example.com/key"}, []string{"--gpg-key"}},
		"a password":                     {UserDataOptions{RPMURL: "https://me:secret@example.com/a.rpm"}, []string{"password"}},
		"a quote":                        {UserDataOptions{RPMURL: "https://example.com/a'$(reboot)'.rpm"}, []string{"is not a URL"}},
		"white space":                    {UserDataOptions{RPMURL: "https://example.com/a.rpm\nruncmd: [reboot]"}, []string{"is not a URL"}},
		"a brace":                        {UserDataOptions{RPMURL: "https://example.com/{{v1.region}}.rpm"}, []string{"is not a URL"}},
		"a fragment":                     {UserDataOptions{RPMURL: testRPM + "#x"}, []string{"is not a URL"}},
		"a repository and an RPM":        {UserDataOptions{RPMURL: testRPM, RepoURL: "https://example.com/"}, []string{"--repo: it excludes --rpm"}},
		"a repository and a checksum":    {UserDataOptions{RepoURL: "https://example.com/", SHA256: testSum}, []string{"--repo: it excludes --rpm and --sha256"}},
		"a repository over http, no key": {UserDataOptions{RepoURL: "http://example.com/"}, []string{"--repo", "or --gpg-key in addition"}},
		"a quote in a repository":        {UserDataOptions{RepoURL: "https://example.com/'"}, []string{"--repo", "is not a URL"}},
		"too long":                       {UserDataOptions{RPMURL: testRPM + strings.Repeat("x", 2000)}, []string{"longer"}},
		"half a checksum":                {UserDataOptions{RPMURL: testRPM, SHA256: testSum[:40]}, []string{"--sha256", "64 hexadecimal digits"}},
		"not hexadecimal":                {UserDataOptions{RPMURL: testRPM, SHA256: strings.Repeat("g", 64)}, []string{"--sha256"}},
		"a name as client":               {UserDataOptions{RPMURL: testRPM, ClientIP: "office.example.com"}, []string{"--client-ip", "names are not looked up"}},
		"any address as client":          {UserDataOptions{RPMURL: testRPM, ClientIP: "0.0.0.0/0"}, []string{"--client-ip"}},
		"unexpanded jinja":               {UserDataOptions{RPMURL: testRPM, ClientIP: "CI_MISSING_JINJA_VAR/ip"}, []string{"template variable"}},
		"bad profile name":               {UserDataOptions{RPMURL: testRPM, Profile: "web; reboot"}, []string{"--profile"}},
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
				t.Errorf("%s: the error does not contain %q: %v", name, want, err)
			}
		}
	}
}

// testCA is a certificate, as far as this package reads one.
const testCA = "-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n"

func TestCA(t *testing.T) {
	for name, tt := range map[string]struct{ ca, want string }{
		"text around it": {"CN = example\r\n" + strings.ReplaceAll(testCA, "\n", "\r\n") + "more $(reboot)\n" + testCA, testCA + testCA},
		"none":           {"-----BEGIN NOTHING", "contains no certificate"},
		"a private key":  {testCA + "-----BEGIN PRIVATE KEY-----\nMAA=\n-----END PRIVATE KEY-----\n", "certificates only"},
		"a bundle":       {strings.Repeat(testCA, 100), "more than 4096 bytes"},
	} {
		data, err := UserData(UserDataOptions{RepoURL: "https://example.com/", CA: []byte(tt.ca)})
		if err != nil {
			if !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		in := "<<'END'\n" + tt.want + "END\n"
		if !strings.Contains(strings.ReplaceAll(string(data), "\n      ", "\n"), in) {
			t.Errorf("%s: not %q in\n%s", name, in, data)
		}
		if n := strings.Count(string(data), "sslcacert"); n != 2 {
			t.Errorf("%s: dnf and cloud-init do not trust it:\n%s", name, data)
		}
		p := filepath.Join(t.TempDir(), "user-data")
		if err := os.WriteFile(p, data, 0o600); err != nil {
			t.Fatal(err)
		}
		checkSchema(t, p)
	}
}

// TestMIME checks with cloud-init's own code that the multipart message and another
// cloud-config, before or after it, both take effect.
func TestMIME(t *testing.T) {
	lab.NeedTools(t, "/usr/bin/python3", "/usr/bin/cloud-init")
	data, err := UserData(UserDataOptions{RepoURL: "https://example.com/repo", KeyURL: "https://example.com/key", MIME: true})
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{"{{", "{%", "{#", "${", "%{"} {
		if bytes.Contains(data, []byte(text)) {
			t.Errorf("it contains %q, which jinja or Terraform interprets", text)
		}
	}
	const program = `
import email, os, subprocess, sys, tempfile, yaml
from email.mime.text import MIMEText
from cloudinit import handlers, helpers, stages, user_data
from cloudinit.handlers.boot_hook import BootHookPartHandler
from cloudinit.handlers.cloud_config import CloudConfigPartHandler

OWN = """#cloud-config
bootcmd: [echo own boot]
runcmd: [echo own run]
packages: [nginx]
yum_repos: {own: {baseurl: "https://example.com/own"}}
"""
HOW = "merge_how: 'list(append)+dict(recurse_list)+str()'\n"
ours = sys.stdin.read()
script = ["sh", "/run/basicfw-bootstrap"]

def merged(first, own, ends):
    message = email.message_from_string(ours)
    part = MIMEText(own, "cloud-config")
    message.get_payload().insert(0 if first else 2, part)
    blob = message.as_string().replace("\n", ends)
    dir = tempfile.mkdtemp()
    paths = helpers.Paths({"cloud_dir": dir, "run_dir": dir})
    paths.get_ipath = lambda name=None: os.path.join(dir, name)
    os.mkdir(os.path.join(dir, "boothooks"))
    config = CloudConfigPartHandler(paths)
    hooks = BootHookPartHandler(paths, None)
    ran = []
    import cloudinit.handlers.boot_hook as module
    module.subp.subp = lambda args, env=None: ran.append(open(args[0]).read())
    config.handle_part(None, handlers.CONTENT_START, None, None, None, None)
    for n, part in enumerate(user_data.UserDataProcessor(paths).process(blob.encode()).walk()):
        payload, kind = part.get_payload(decode=True), part.get_content_type()
        if kind == "text/cloud-config":
            config.handle_part(None, kind, str(n), payload.decode(), None, part)
        elif kind == "text/cloud-boothook":
            hooks.handle_part(None, kind, str(n), payload.decode(), None)
        else:
            assert kind == "multipart/mixed", kind
    config.handle_part(None, handlers.CONTENT_END, None, None, None, None)
    assert len(ran) == 1 and ran[0].startswith("#!/bin/sh\n") and "\r" not in ran[0], ran
    subprocess.run(["sh", "-n"], input=ran[0], text=True, check=True)
    return os.path.join(dir, "cloud_config")

for ends in "\n", "\r\n":
    for first in True, False:
        for how in "", HOW:
            file = merged(first, OWN + how, ends)
            doc = yaml.safe_load(open(file))
            assert "echo own boot" in doc["bootcmd"] and "echo own run" in doc["runcmd"] and "nginx" in doc["packages"] and "own" in doc["yum_repos"], doc
            # The last part without merge_how replaces lists: the boothook remains.
            if first or how:
                assert script in doc["bootcmd"] and script in doc["runcmd"] and "basicfw-agent" in doc["packages"] and "basicfw" in doc["yum_repos"], doc
                assert len(doc["bootcmd"]) == len(doc["runcmd"]) == len(doc["packages"]) == 2, doc
            
            subprocess.run(["cloud-init", "schema", "--config-file", file], check=True)
`
	if res, err := (&system.System{}).Run(context.Background(), system.Command{Name: "/usr/bin/python3", Args: []string{"-c", program}, Stdin: data}); err != nil {
		t.Errorf("%v\n%s%s", err, res.Stdout, res.Stderr)
	}
}

// values matches the lines that hold the options; all other lines are the same
// for all options.
var values = regexp.MustCompile(`(?m)^ {4,6}(rpm=|sha256=|key=|repo=|set -- |baseurl: |gpgkey: )([^\n]*)$`)

// FuzzUserData checks that accepted options change only the lines that hold
// them.
func FuzzUserData(f *testing.F) {
	f.Add(testRPM, "", testSum, "", "203.0.113.7", "web-only")
	f.Add("http://example.com/'\"$`\\a.rpm", "", testSum, "https://k/", "::1,2001:db8::/64\n", "web+mail")
	f.Add("https://example.com/%0a%27?a='", "", "", "https://k/'", "1.2.3.4\n- reboot", "a\nb")
	f.Add("https://é.example/ ", "", "", "https://k/\x00", "fe80::1%eth0", "--")
	f.Add("", "https://example.com/$(reboot)", "", "https://k/", "1.2.3.4", "")
	f.Add("", "https://example.com/: a", "", "", "", "")
	plain := map[[2]bool]string{}
	for _, o := range []UserDataOptions{{RPMURL: testRPM}, {RepoURL: testRPM}, {RepoURL: testRPM, KeyURL: testRPM}} {
		data, err := UserData(o)
		if err != nil {
			f.Fatal(err)
		}
		plain[[2]bool{o.RepoURL != "", o.KeyURL != ""}] = values.ReplaceAllString(string(data), "$1")
	}
	plain[[2]bool{false, true}] = plain[[2]bool{}]
	const url = `'https?://[!$&(-;=?-Z\[\]_a-z~%]*'`
	safe := regexp.MustCompile(`^ {4,6}(rpm=` + url + `|repo=` + url + `|key=(''|` + url + `)|sha256='([0-9a-f]{64})?'|set -- [a-z0-9+._,:/ -]*|(baseurl|gpgkey): ` + url + `)$`)
	f.Fuzz(func(t *testing.T, rpm, repo, sum, key, client, profile string) {
		data, err := UserData(UserDataOptions{RPMURL: rpm, RepoURL: repo, SHA256: sum, KeyURL: key, ClientIP: client, Profile: profile})
		if err != nil {
			if data != nil {
				t.Error("user-data is returned with an error")
			}
			return
		}
		if got := values.ReplaceAllString(string(data), "$1"); got != plain[[2]bool{repo != "", key != ""}] {
			t.Errorf("other lines than the options' changed:\n%s", data)
		}
		for _, line := range values.FindAllString(string(data), -1) {
			if !safe.MatchString(line) {
				t.Errorf("unsafe line %q", line)
			}
		}
	})
}

// TestRoundTrip checks that a real YAML parser and a real shell read the options unchanged.
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
		t.Fatalf("only %d URLs were accepted", len(rounds))
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
    assert doc["runcmd"] == [["sh", "/run/basicfw-bootstrap"]], doc
    script = doc["bootcmd"][1]
    assert script[:2] == ["sh", "-c"] and len(script) == 3, script
    begin, end = "cat >/run/basicfw-bootstrap <<'BASICFW'\n", "\nBASICFW\nexec sh /run/basicfw-bootstrap\n"
    assert script[2].startswith(begin) and script[2].endswith(end), script
    head = script[2][len(begin):-len(end)].split("tell()")[0].split('[ -e "$message" ] || finish')[1]
    out = subprocess.run(["sh", "-c", head + "printf '%s\\n' \"$rpm\" \"$sha256\" \"$@\""], capture_output=True, text=True, check=True).stdout
    assert out == "".join(w + "\n" for w in r["Want"]), (out, r["Want"])
print("fine")
`
	res, err := (&system.System{}).Run(context.Background(), system.Command{Name: "/usr/bin/python3", Args: []string{"-c", program}, Stdin: in})
	if err != nil || string(res.Stdout) != "fine\n" {
		t.Errorf("%s %v", res.Stdout, err)
	}
}
