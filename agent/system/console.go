package system

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// consolesFile lists the kernel's consoles, such as "tty0 ttyS0" (Linux 2.6.37 and
// later).
const consolesFile = "/sys/class/tty/console/active"

// serialLine reports whether a console is a serial line (of a PC, of ARM or of a
// hypervisor), not a screen.
func serialLine(name string) bool {
	kind := strings.TrimRight(name, "0123456789")
	return kind != name && (kind == "ttyS" || kind == "ttyAMA" || kind == "hvc")
}

// Say writes a line to the machine's serial consoles, and with shown also to its
// screen. A console that accepts no output, because its terminal has stopped it,
// delays this for at most about a second. With a Root it does nothing.
func (s *System) Say(text string, shown bool) error {
	if s.Root != "" {
		return nil
	}
	active, err := s.ReadLimited(consolesFile, 4096)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	var devices []string
	for _, name := range strings.Fields(string(active)) {
		if serialLine(name) {
			devices = append(devices, "/dev/"+name)
		}
	}
	if shown {
		devices = append(devices, "/dev/tty0") // the visible virtual terminal
	}
	return s.Do("say", strings.Join(devices, " "), func() error { return sayTo(devices, text) })
}

// sayLimit is the timeout for a line.
const sayLimit = time.Second

func sayTo(devices []string, text string) error {
	said := make(chan error, len(devices))
	for _, d := range devices {
		go func() { said <- sayOn(d, text) }()
	}
	limit := time.After(sayLimit + sayLimit/4)
	var errs []error
	for range devices {
		select {
		case err := <-said:
			errs = append(errs, err)
		case <-limit:
			// Closing a stopped line takes the kernel up to half a minute. The
			// goroutine waits for that.
			return errors.Join(append(errs, errors.New("a console accepts no output"))...)
		}
	}
	return errors.Join(errs...)
}

// sayOn writes a line to a console. A missing one is no error.
func sayOn(device, text string) error {
	f, err := os.OpenFile(device, os.O_WRONLY|unix.O_NOCTTY|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if fi, err := f.Stat(); err != nil || fi.Mode()&fs.ModeCharDevice == 0 {
		return fmt.Errorf("%s is not a console", device)
	}
	if err := f.SetWriteDeadline(time.Now().Add(sayLimit)); err != nil {
		return err
	}
	// The line starts after a login prompt or typed text. It contains no character
	// that the terminal interprets or cannot show.
	line := strings.Map(func(r rune) rune {
		if r > '~' {
			return '?'
		}
		return r
	}, Printable(text))
	_, err = f.WriteString("\r\n" + line + "\r\n")
	return err
}
