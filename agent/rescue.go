package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"time"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/system"
)

// The two ways to unlock a machine that nobody can log in to, not even at its
// console, for want of a password: an argument of the kernel, given at the boot
// loader's prompt, and a file that is made from a rescue system. Each may say
// for how long, and works once.
const (
	RescueFile     = "/etc/basicfw/unlock"
	rescueArgument = "basicfw.unlock"
	rescueLength   = 15 * time.Minute
)

// rescue unlocks the machine at a boot that was told to. It changes the state
// alone: the boot then loads what that says.
func (a *Agent) rescue(commandLine string) error {
	st, err := a.Store.Load()
	if err != nil {
		return nil // there is nothing to unlock, or the failsafe rules come, where SSH is open
	}
	argument := kernelArgument(commandLine)
	text, file, err := a.rescueFile()
	switch {
	case err != nil:
		return err
	case file:
		// First: a file that cannot be removed would unlock at every boot.
		if err := a.System.Remove(RescueFile); err != nil {
			return fmt.Errorf("not unlocked: %w", err)
		}
	case argument == st.RescueArgument:
		return nil // none, or one that has been followed
	}
	why := RescueFile
	if !file {
		text = strings.TrimPrefix(strings.TrimPrefix(argument, rescueArgument), "=")
		why = "the kernel's argument " + system.Printable(argument)
	}
	st.RescueArgument = argument
	if file || argument != "" {
		length, err := rescueTime(text)
		if err != nil {
			a.Log.WithError(err).Warnf("%s asks for no time that can be; it is %v", why, rescueLength)
		}
		st.Desired.Unlock = &firewall.Unlock{Window: firewall.NewWindow(a.Moment(), length)}
		if st.Ruleset, err = firewall.Compile(st.Desired); err != nil {
			return err
		}
		a.Log.Warnf("unlocked for %v, by %s: SSH is open to any address, limited", length, why)
	}
	return a.Store.Save(st)
}

// rescueFile tells whether the file is there, and what it says. One that others
// than root may have written is not followed.
func (a *Agent) rescueFile() (text string, there bool, err error) {
	fi, err := a.System.Lstat(RescueFile)
	if errors.Is(err, fs.ErrNotExist) {
		return "", false, nil
	}
	if err == nil {
		err = system.CheckOwner(fi)
	}
	if err != nil {
		return "", false, fmt.Errorf("not unlocked: %s: %w", RescueFile, err)
	}
	data, err := a.System.ReadLimited(RescueFile, 4096)
	return string(data), true, err
}

// kernelArgument gives our argument of the kernel's command line, or "".
func kernelArgument(commandLine string) string {
	for _, word := range strings.Fields(commandLine) {
		if word == rescueArgument || strings.HasPrefix(word, rescueArgument+"=") {
			return word
		}
	}
	return ""
}

// rescueTime is how long to unlock for; what says nothing, or nonsense, is the
// usual time: who is shut out must not fail for a typing mistake.
func rescueTime(text string) (time.Duration, error) {
	text = strings.TrimSpace(text)
	if text == "" {
		return rescueLength, nil
	}
	length, err := firewall.ParseFor(text)
	if err != nil {
		return rescueLength, err
	}
	return length, nil
}
