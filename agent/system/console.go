package system

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"regexp"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// consolesFile names what the kernel prints to, such as "tty0 ttyS0" (Linux
// 2.6.37 and later).
const consolesFile = "/sys/class/tty/console/active"

// serialLine is a console that is a line, and no screen: the PC's, ARM's and
// those of hypervisors.
var serialLine = regexp.MustCompile(`^(ttyS|ttyAMA|hvc)[0-9]+$`)

// screen is the virtual terminal that is shown, which the kernel prints to or
// not.
const screen = "tty0"

// Say writes a line to the serial consoles of the machine, and with shown to
// its screen too. A console that takes nothing, because who is at its other end
// holds it up, keeps nobody waiting for longer than a second. Below a root there
// are no consoles.
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
		if serialLine.MatchString(name) {
			devices = append(devices, "/dev/"+name)
		}
	}
	if shown {
		devices = append(devices, "/dev/"+screen)
	}
	return s.Do("say", strings.Join(devices, " "), func() error { return sayTo(devices, text) })
}

// sayLimit is how long a line may take to get out.
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
			// The kernel lets a line that is held up empty itself for half a
			// minute before it closes it. That goes on without us.
			return errors.Join(append(errs, errors.New("a console does not take what is said"))...)
		}
	}
	return errors.Join(errs...)
}

// sayOn writes a line to a console; one that is not there is no error.
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
		return fmt.Errorf("%s is no console", device)
	}
	if err := f.SetWriteDeadline(time.Now().Add(sayLimit)); err != nil {
		return err
	}
	// Behind a login prompt, or what somebody types. What a terminal might take
	// for a command, or cannot show, is none of it.
	line := strings.Map(func(r rune) rune {
		if r > '~' {
			return '?'
		}
		return r
	}, Printable(text))
	_, err = f.WriteString("\r\n" + line + "\r\n")
	return err
}
