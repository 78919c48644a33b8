package conflict

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/system"
	"github.com/basicfw/basicfw-agent/test/lab"
)

// systemctl is the part of systemctl that is needed here. A file each records whether a
// unit exists, is enabled, masked, up or queued.
const systemctl = `#!/bin/sh
cd ROOT || exit
[ "$1" != --quiet ] || shift
cmd=$1
shift
case $1 in --no-block|--now) now=$1; shift;; esac
case $cmd in show) shift 2;; esac
unit=$1
echo "$cmd $now $unit" | tr -s ' ' >>calls
etc=etc/systemd/system
is() { if eval "$1"; then echo "$2"; else echo "$3"; fi; }
case $cmd in
show)
	load=$(is '[ -e usr/lib/systemd/system/$unit ]' loaded not-found)
	! [ -L $etc/$unit ] || load=masked
	printf 'LoadState=%s\nUnitFileState=%s\nActiveState=%s\nJob=%s\n' "$load" \
		"$(is '[ -L $etc/multi-user.target.wants/$unit ]' enabled disabled)" "$(is '[ -e run/up/$unit ]' active inactive)" "$(is '[ -e run/job/$unit ]' 7 0)";;
enable) ln -sf /usr/lib/systemd/system/$unit $etc/multi-user.target.wants/$unit;;
disable) rm -f $etc/multi-user.target.wants/$unit;;
mask) ln -s /dev/null $etc/$unit; [ -z "$now" ] || rm -f run/up/$unit;;
unmask) rm -f $etc/$unit;;
start) if [ "$now" = --no-block ]; then touch run/job/$unit; else touch run/up/$unit; fi;;
stop) rm -f run/up/$unit run/job/$unit;;
esac
`

type bench struct {
	*Resolver
	root  string
	table bool // nftables has firewalld's table
	steps []string
	fail  int
}

// newBench returns a machine with units that are up and enabled.
func newBench(t *testing.T, live bool, units ...string) *bench {
	t.Helper()
	b := &bench{root: t.TempDir()}
	for _, dir := range []string{"etc/systemd/system/multi-user.target.wants", "usr/lib/systemd/system", "run/up", "run/job", "bin"} {
		if err := os.MkdirAll(filepath.Join(b.root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	b.put(t, "bin/systemctl", strings.ReplaceAll(systemctl, "ROOT", b.root), 0o755)
	b.put(t, "bin/firewall-cmd", "#!/bin/sh\n[ -e "+b.root+"/run/up/firewalld.service ]\n", 0o755)
	b.put(t, "bin/shorewall", "#!/bin/sh\necho \"shorewall $1\" >>"+b.root+"/calls\n", 0o755)
	sys := &system.System{Root: b.root, Programs: []string{b.root + "/bin"}, Step: lab.Before(func(op, name string) error {
		b.steps = append(b.steps, op+" "+name)
		if len(b.steps) == b.fail {
			return fmt.Errorf("step %d, %s %s: %w", b.fail, op, name, fs.ErrPermission)
		}
		return nil
	})}
	b.Resolver = New(sys, func(string) (bool, error) { return b.table, nil })
	b.cgroups = b.root
	b.live = func() bool { return live }
	for _, u := range units {
		b.put(t, "usr/lib/systemd/system/"+u, "", 0o644)
		b.put(t, "run/up/"+u, "", 0o644)
		if err := os.Symlink("/usr/lib/systemd/system/"+u, filepath.Join(b.root, "etc/systemd/system/multi-user.target.wants", u)); err != nil {
			t.Fatal(err)
		}
	}
	return b
}

func (b *bench) put(t *testing.T, path, text string, mode fs.FileMode) {
	t.Helper()
	path = filepath.Join(b.root, path)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
}

func (b *bench) calls() string {
	data, _ := os.ReadFile(filepath.Join(b.root, "calls"))
	os.Remove(filepath.Join(b.root, "calls"))
	var out []string
	for _, line := range strings.Split(strings.TrimSpace(string(data)), "\n") {
		if !strings.HasPrefix(line, "show ") {
			out = append(out, line)
		}
	}
	return strings.Join(out, "\n")
}

// units returns the units that are up, queued, enabled and masked.
func (b *bench) units(t *testing.T) string {
	t.Helper()
	var out []string
	for _, pattern := range []string{"run/up/*", "run/job/*", "etc/systemd/system/*", "etc/systemd/system/*/*"} {
		found, err := filepath.Glob(filepath.Join(b.root, pattern))
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range found {
			target, _ := os.Readlink(f)
			out = append(out, strings.TrimPrefix(f, b.root)+" "+target)
		}
	}
	return strings.Join(out, "\n")
}

func TestFind(t *testing.T) {
	for name, tt := range map[string]struct {
		spoil  func(b *bench)
		chains []string
		want   []firewall.Conflict
	}{
		"none":                   {spoil: func(b *bench) {}},
		"only firewalld's table": {spoil: func(b *bench) { b.table = true }, want: []firewall.Conflict{{Name: "firewalld", Active: true}}},
		"only chains":            {spoil: func(b *bench) {}, chains: []string{"shorewall"}, want: []firewall.Conflict{{Name: "shorewall", Active: true}}},
		"firewalld enabled": {spoil: func(b *bench) { b.enable(t, "firewalld.service") },
			want: []firewall.Conflict{{Name: "firewalld", Enabled: true}}},
		"firewalld enabled and masked": {spoil: func(b *bench) {
			b.enable(t, "firewalld.service")
			os.Symlink(os.DevNull, filepath.Join(b.root, "etc/systemd/system/firewalld.service"))
		}},
		"firewalld is starting": {spoil: func(b *bench) { b.put(t, "system.slice/firewalld.service/cgroup.events", "populated 1\n", 0o644) },
			want: []firewall.Conflict{{Name: "firewalld", Active: true}}},
		"ufw enabled but off": {spoil: func(b *bench) {
			b.enable(t, "ufw.service")
			b.put(t, "etc/ufw/ufw.conf", "# ENABLED=yes\nENABLED=no\n", 0o644)
		}},
		"ufw on at the next boot": {spoil: func(b *bench) {
			b.enable(t, "ufw.service")
			b.put(t, "etc/ufw/ufw.conf", "ENABLED=yes\nLOGLEVEL=low\n", 0o644)
		}, want: []firewall.Conflict{{Name: "ufw", Enabled: true}}},
		"shorewall6 enabled": {spoil: func(b *bench) { b.enable(t, "shorewall6.service") }, want: []firewall.Conflict{{Name: "shorewall", Enabled: true}}},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, true)
			tt.spoil(b)
			b.steps = nil
			got, err := b.Find(tt.chains)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if len(b.steps) > 0 {
				t.Errorf("it runs %q", b.steps)
			}
		})
	}
}

func (b *bench) enable(t *testing.T, unit string) {
	t.Helper()
	if err := os.Symlink("/lib/systemd/system/"+unit, filepath.Join(b.root, "etc/systemd/system/multi-user.target.wants", unit)); err != nil {
		t.Fatal(err)
	}
}

// Stop and Restore call systemctl as expected.
func TestStopAndRestore(t *testing.T) {
	for name, tt := range map[string]struct {
		manager       string
		spoil         func(b *bench)
		stop, restore string
	}{
		"firewalld": {manager: "firewalld",
			stop:    "disable firewalld.service\nstop firewalld.service\nmask --now firewalld.service",
			restore: "unmask firewalld.service\nenable firewalld.service\nstart firewalld.service"},
		"ufw": {manager: "ufw", stop: "disable ufw.service\nstop ufw.service", restore: "enable ufw.service\nstart ufw.service"},
		"ufw by hand": {manager: "ufw", spoil: func(b *bench) { os.Remove(b.root + "/run/up/ufw.service") },
			stop: "start ufw.service\ndisable ufw.service\nstop ufw.service", restore: "enable ufw.service\nstart ufw.service"},
		"ufw not enabled": {manager: "ufw", spoil: func(b *bench) { os.Remove(b.root + "/etc/systemd/system/multi-user.target.wants/ufw.service") },
			stop: "stop ufw.service", restore: "start ufw.service"},
		"shorewall": {manager: "shorewall",
			stop: "disable shorewall.service\nstop shorewall.service\nshorewall clear", restore: "enable shorewall.service\nstart shorewall.service"},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, true, "firewalld.service", "ufw.service", "shorewall.service")
			if tt.spoil != nil {
				tt.spoil(b)
			}
			before := b.units(t)
			rec, err := b.Record(context.Background(), firewall.Conflict{Name: tt.manager, Active: true})
			if err != nil {
				t.Fatal(err)
			}
			if err := b.Stop(context.Background(), rec, true); err != nil {
				t.Fatal(err)
			}
			if got := b.calls(); got != tt.stop {
				t.Errorf("Stop called systemctl with\n%s\nnot\n%s", got, tt.stop)
			}
			if got := b.units(t); strings.Contains(got, "up/"+tt.manager) || strings.Contains(got, "wants/"+tt.manager) {
				t.Errorf("stopped: %s", got)
			}
			if gone, err := b.Restore(context.Background(), rec, true); err != nil || gone {
				t.Fatalf("gone %v, %v", gone, err)
			}
			if got := b.calls(); got != tt.restore {
				t.Errorf("Restore called systemctl with\n%s\nnot\n%s", got, tt.restore)
			}
			if name == "ufw by hand" { // its unit restores its rules
				before = strings.Replace(before, "/run/up/shorewall.service ", "/run/up/shorewall.service \n/run/up/ufw.service ", 1)
			}
			if after := b.units(t); after != before {
				t.Errorf("after\n%s\nbefore\n%s", after, before)
			}
		})
	}
}

// Each step fails once. Restore then restores everything.
func TestStopFails(t *testing.T) {
	for _, live := range []bool{true, false} {
		for n, done := 1, false; !done; n++ {
			b := newBench(t, live, "firewalld.service")
			before := b.units(t)
			ctx := context.Background()
			rec, err := b.Record(ctx, firewall.Conflict{Name: "firewalld", Active: live, Enabled: true})
			if err != nil {
				t.Fatal(err)
			}
			b.steps, b.fail = nil, n
			err = b.Stop(ctx, rec, live)
			if done = len(b.steps) < n; done {
				if err != nil || n < 2 {
					t.Fatalf("%v after %d steps", err, n)
				}
				if u := b.units(t); !strings.Contains(u, "/firewalld.service /dev/null") || strings.Contains(u, "wants/") {
					t.Errorf("live %v: %s", live, u)
				}
			} else if !errors.Is(err, fs.ErrPermission) {
				t.Fatalf("%s: %v", b.steps[n-1], err)
			}
			b.fail = 0
			if _, err := b.Restore(ctx, rec, true); err != nil {
				t.Errorf("Restore after %s: %v", b.steps[len(b.steps)-1], err)
			}
			if after := b.units(t); after != before {
				t.Errorf("live %v, %v: after\n%s\nbefore\n%s", live, b.steps, after, before)
			}
		}
	}
}

// Early in a boot the start of a unit is queued. Waiting for it might be waiting for
// this program itself.
func TestQueued(t *testing.T) {
	b := newBench(t, true, "firewalld.service")
	os.Rename(b.root+"/run/up/firewalld.service", b.root+"/run/job/firewalld.service")
	ctx := context.Background()
	rec, err := b.Record(ctx, firewall.Conflict{Name: "firewalld", Enabled: true})
	if err != nil || !rec.Units[0].Queued || !rec.Units[0].Active {
		t.Fatalf("%+v, %v", rec, err)
	}
	if err := b.Stop(ctx, rec, false); err != nil {
		t.Fatal(err)
	}
	if got, want := b.calls(), "disable firewalld.service\nstop firewalld.service\nmask --now firewalld.service"; got != want {
		t.Errorf("systemctl was called with\n%s", got)
	}
	if _, err := b.Restore(ctx, rec, true); err != nil {
		t.Fatal(err)
	}
	if got := b.calls(); !strings.HasSuffix(got, "\nstart --no-block firewalld.service") {
		t.Errorf("systemctl was called with\n%s", got)
	}
	os.Remove(b.root + "/run/job/firewalld.service")
	if _, err := b.Restore(ctx, rec, false); err != nil {
		t.Fatal(err)
	}
	if got := b.calls(); !strings.HasSuffix(got, "\nstart firewalld.service") {
		t.Errorf("in a later boot systemctl was called with\n%s", got)
	}
}

func TestNotHereAndGone(t *testing.T) {
	ctx := context.Background()
	for name, b := range map[string]*bench{
		"no unit":      newBench(t, true),
		"another root": newBench(t, false, "ufw.service"),
		"masked":       newBench(t, true, "ufw.service"),
	} {
		if name == "masked" {
			os.Symlink(os.DevNull, b.root+"/etc/systemd/system/ufw.service")
		}
		var notHere *NotHereError
		if _, err := b.Record(ctx, firewall.Conflict{Name: "ufw", Active: true}); !errors.As(err, &notHere) {
			t.Errorf("%s: %v", name, err)
		}
	}
	b := newBench(t, true, "ufw.service")
	rec, err := b.Record(ctx, firewall.Conflict{Name: "ufw", Active: true})
	if err != nil {
		t.Fatal(err)
	}
	os.Remove(b.root + "/usr/lib/systemd/system/ufw.service")
	if gone, err := b.Restore(ctx, rec, false); err != nil || !gone {
		t.Errorf("removed since: gone %v, %v", gone, err)
	}
	// A unit that stays up after a stop.
	b = newBench(t, true, "ufw.service")
	b.put(t, "bin/systemctl", strings.ReplaceAll(strings.ReplaceAll(systemctl, "ROOT", b.root), "stop)", "no)"), 0o755)
	if err := b.Stop(ctx, rec, true); err == nil || !strings.Contains(err.Error(), "still active") {
		t.Errorf("%v", err)
	}
}
