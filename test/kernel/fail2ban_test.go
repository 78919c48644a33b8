package kernel_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// TestFail2ban bans the stranger with the packaged action of a real fail2ban. The action runs
// block and unblock, which other tests run with each backend.
func TestFail2ban(t *testing.T) {
	on(t, []string{"nft"}, func(t *testing.T, m *machine) {
		lab.NeedTools(t, "fail2ban-server")
		m.Host.Listen(t, 80)
		m.bootstrap(t)
		action, err := os.ReadFile("../../packaging/rpm/fail2ban.conf")
		if err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		file := func(name, text string) string {
			t.Helper()
			path := filepath.Join(dir, name)
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
			return path
		}
		log := file("log", "")
		file("action.d/basicfw.conf", string(action))
		file("filter.d/knock.conf", "[Definition]\nfailregex = ^ knock from <ADDR>$\ndatepattern = ^EPOCH\n")
		file("fail2ban.conf", "[Definition]\nloglevel = INFO\nlogtarget = "+filepath.Join(dir, "f2b.log")+"\nsyslogsocket = auto\nsocket = "+filepath.Join(dir, "sock")+
			"\npidfile = "+filepath.Join(dir, "pid")+"\ndbfile = "+filepath.Join(dir, "db")+"\ndbpurgeage = 1d\n")
		file("jail.conf", "[DEFAULT]\nenabled = true\nbackend = polling\nmaxretry = 1\nfindtime = 1d\nbantime = 1h\nlogpath = "+log+
			"\nfilter = knock\naction = basicfw[command=\""+program+" --root "+m.root+"\"]\n[knock]\n[Other_jail.of-long-name]\n")
		client := func(args ...string) lab.Command {
			return lab.Command{Args: append([]string{"fail2ban-client", "-c", dir, "-s", filepath.Join(dir, "sock"), "-p", filepath.Join(dir, "pid")}, args...),
				Env: m.command().Env, Dir: "/"}
		}
		run := func(args ...string) {
			t.Helper()
			if r := m.Host.Run(t, client(args...)); r.Code != 0 {
				said, _ := os.ReadFile(filepath.Join(dir, "f2b.log"))
				t.Fatalf("fail2ban-client %s: %s%s\n%s", strings.Join(args, " "), r.Stdout, r.Stderr, said)
			}
		}
		reached := func(want string) {
			t.Helper()
			lab.Poll(t, "port 80 to answer "+want, func() bool { return m.reached("80/tcp", want, lab.Brief) == want })
		}
		m.Host.Start(t, client("-f", "start"))
		lab.Poll(t, "fail2ban to start", func() bool { return m.Host.Run(t, client("ping")).Code == 0 })
		for _, a := range m.Stranger.Both() {
			run("set", "knock", "banip", a.String())
		}
		reached("client4 client6")
		says(t, m.must(t, exitOK, "block", "list").Stdout, m.Stranger.V4.String(), "until", "f2b-knock")
		run("set", "knock", "unbanip", m.Stranger.V6.String())
		reached("client4 client6 stranger6")
		run("set", "Other_jail.of-long-name", "banip", m.Stranger.V4.String())
		run("set", "knock", "unbanip", m.Stranger.V4.String())
		reached("client4 client6 stranger6") // the other jail's ban stays
		run("restart")                       // it restores its bans
		reached("client4 client6 stranger6")
		m.must(t, exitOK, "verify", "--repair")
		run("stop") // it ends its bans
		reached(everybody)
	})
}
