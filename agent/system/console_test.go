package system

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// terminal returns a pseudoterminal's master and the name of its device.
func terminal(t *testing.T) (master *os.File, device string) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { master.Close() })
	var n int
	conn, err := master.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if e := conn.Control(func(fd uintptr) {
		if err = unix.IoctlSetPointerInt(int(fd), unix.TIOCSPTLCK, 0); err == nil {
			n, err = unix.IoctlGetInt(int(fd), unix.TIOCGPTN)
		}
	}); e != nil || err != nil {
		t.Fatal(e, err)
	}
	return master, fmt.Sprintf("/dev/pts/%d", n)
}

// A console receives a separate line in plain characters.
func TestSay(t *testing.T) {
	master, device := terminal(t)
	gone := filepath.Join(t.TempDir(), "ttyS9")
	if err := sayTo([]string{gone, device}, "SSH is for \x1b[2Jjörg"); err != nil {
		t.Fatal(err)
	}
	want := "\r\r\nSSH is for ?[2Jj?rg\r\r\n" // as a terminal shows a newline
	got := make([]byte, len(want))
	if _, err := io.ReadFull(master, got); err != nil || string(got) != want {
		t.Errorf("it shows %q, %v", got, err)
	}
	plain := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(plain, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := sayTo([]string{plain}, "x"); err == nil {
		t.Error("a file was accepted as a console")
	}
	if data, _ := os.ReadFile(plain); len(data) > 0 {
		t.Errorf("the file contains %q", data)
	}
}

// A stopped console (Ctrl-S) does not block.
func TestSayStopped(t *testing.T) {
	_, device := terminal(t)
	slave, err := os.OpenFile(device, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer slave.Close()
	conn, err := slave.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if e := conn.Control(func(fd uintptr) { err = unix.IoctlSetInt(int(fd), unix.TCXONC, unix.TCOOFF) }); e != nil || err != nil {
		t.Fatal(e, err)
	}
	begun := time.Now()
	err = sayTo([]string{device}, strings.Repeat("x", 1<<16))
	if took := time.Since(begun); err == nil || took > 5*sayLimit {
		t.Errorf("%v, after %v", err, took)
	}
}
