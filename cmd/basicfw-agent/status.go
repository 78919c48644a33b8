//go:build linux

package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/basicfw/basicfw-agent/agent"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/report"
	"github.com/basicfw/basicfw-agent/agent/service"
	"github.com/basicfw/basicfw-agent/agent/store"
	"github.com/basicfw/basicfw-agent/agent/system"
	"github.com/basicfw/basicfw-agent/agent/verify"
)

func (a *app) statusCmd() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show whether this machine is protected, and why",
		Long: `Show the status of this machine: first the verdict, then the desired state and
its reasons, and last the command to run next, if any. Exit code 0 means
protected, 3 not protected, 4 not bootstrapped.`,
		Args: noArgs,
		RunE: a.readOnly(func(ctx context.Context, machine *agent.Agent) error {
			st, err := machine.Status(ctx)
			if err != nil {
				return err
			}
			if asJSON {
				err = a.printJSON(st)
			} else {
				printStatus(a.terminal, st, time.Now(), coloured(a.terminal))
			}
			if code := st.ExitCode(); err == nil && code != 0 {
				return &silentError{code}
			}
			return err
		}),
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// coloured reports whether w is a terminal that accepts colours (no-color.org).
func coloured(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok || os.Getenv("NO_COLOR") != "" || os.Getenv("TERM") == "dumb" {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// The size of the screen that status must fit.
const (
	screenWidth = 80
	screenLines = 24
	labelWidth  = 13
)

// screen collects labelled lines, each cut to the width of the screen.
type screen struct{ lines []string }

func (s *screen) add(label, text string) { s.wrap(label, text, 1) }

// wrap adds a text on at most max lines.
func (s *screen) wrap(label, text string, max int) {
	const room = screenWidth - labelWidth
	words := strings.Fields(system.Printable(text))
	for n := 0; n < max && len(words) > 0; n++ {
		line := words[0]
		for words = words[1:]; len(words) > 0 && utf8.RuneCountInString(line) <= room; words = words[1:] {
			if n < max-1 && utf8.RuneCountInString(line)+1+utf8.RuneCountInString(words[0]) > room {
				break
			}
			line += " " + words[0]
		}
		if r := []rune(line); len(r) > room {
			line = string(r[:room-3]) + "..."
		}
		s.lines = append(s.lines, fmt.Sprintf("%-*s%s", labelWidth, label, line))
		label = ""
	}
}

// wrapAll adds several texts under one label, each on at most max lines.
func (s *screen) wrapAll(label string, items []string, max int) {
	for _, item := range items {
		s.wrap(label, item, max)
		label = ""
	}
}

// list adds at most max lines, including how many more items there are.
func (s *screen) list(label string, items []string, max int) {
	if more := len(items) - max; more > 0 && max == 1 {
		items = []string{fmt.Sprintf("(%d more) %s", more, items[0])}
	} else if more > 0 {
		items = append(slices.Clone(items[:max-1]), fmt.Sprintf("and %d more: basicfw-agent status --json", more+1))
	}
	s.wrapAll(label, items, 1)
}

// printStatus prints the status as text on one screen: the verdict first, the next command
// last. Closed listeners and forwarded ports are listed in full if there is room.
func printStatus(out io.Writer, st report.Status, now time.Time, colour bool) {
	c := contentOf(st)
	most := min(max(len(c.closed), len(c.forwarded), 2), screenLines)
	var s screen
search:
	for wide := 4; wide >= 2; wide-- {
		for room := most; room >= 2; room-- {
			if s = layOut(st, c, now, room, wide); len(s.lines) <= screenLines-2 {
				break search
			}
		}
	}
	fmt.Fprintln(out, paint(system.Printable(verdict(st)), st.State, colour))
	for _, l := range s.lines {
		fmt.Fprintln(out, l)
	}
	if len(st.Next) > 0 {
		fmt.Fprintf(out, "%-*s%s\n", labelWidth, "next", system.Printable(st.Next[0]))
	}
}

// content is the text that may be too long for a screen. It is computed once, because
// there may be thousands of listeners and all layouts share it.
type content struct {
	reached                             string   // reachable listeners, and those for which that is unknown
	closed                              []string // the other listeners, one text each
	closedCut                           []string // the same, shortened to one line of the screen
	forwarded, drift, foreign, warnings []string
}

func contentOf(st report.Status) content {
	var c content
	var open, unknown []string
	for _, l := range st.Listening {
		at := fmt.Sprintf("%d/%s", l.Port, l.Proto)
		who := strings.TrimSpace(at + " " + system.Printable(l.Process))
		switch {
		case l.Reachable == nil:
			unknown = append(unknown, who)
		case *l.Reachable:
			open = append(open, who)
		default:
			state := ": closed"
			switch {
			case l.OpenCommand != "":
				state += "; open it: " + l.OpenCommand
			case desired(st):
				state += ", although the configuration opens it"
			}
			c.closed = append(c.closed, who+state)
			if utf8.RuneCountInString(who+state) > screenWidth-labelWidth {
				who = at // the command is more useful than the process
			}
			c.closedCut = append(c.closedCut, who+state)
		}
	}
	const all = screenWidth * screenLines // the screen shows no more
	for _, group := range []struct {
		label string
		list  []string
	}{{"open: ", open}, {"; not known whether open: ", unknown}} {
		if len(group.list) > 0 {
			c.reached += group.label + strings.Join(group.list[:min(len(group.list), all)], ", ")
		}
	}
	c.reached = strings.TrimPrefix(c.reached, "; ")
	c.forwarded = report.ClosedPorts(st.Forwarded)
	for _, b := range st.Forwarded {
		if !b.Closed {
			c.forwarded = append(c.forwarded, forwardedLine(b))
		}
	}
	for _, d := range st.Drift {
		c.drift = append(c.drift, d.String())
	}
	for _, f := range st.Foreign {
		c.foreign = append(c.foreign, fmt.Sprintf("%s %s: %s", f.Family, f.Rule, f.Effect))
	}
	for _, w := range st.Warnings {
		text := w.Text
		if w.Fix != "" && !slices.Contains(st.Next[:min(len(st.Next), 1)], w.Fix) {
			text += ": " + w.Fix
		}
		c.warnings = append(c.warnings, text)
	}
	return c
}

// layOut returns the lines between the verdict and the next command. Closed listeners get
// at most room lines, forwarded ports as many. A long list gets at most wide lines, which
// is at least 2. The remaining lines are for drift, other programs' rules and warnings.
func layOut(st report.Status, c content, now time.Time, room, wide int) screen {
	var s screen
	warnings := min(len(c.warnings), 3) // reserved, at the cost of listeners
	if len(c.drift)+len(c.foreign) > 0 {
		room, wide, warnings = min(room, 2), 2, 1
	}
	if st.Why != "" {
		s.wrap("why", st.Why, 2)
	}
	if desired(st) {
		s.add("profile", fmt.Sprintf("%s: %s", st.Profile.Name, st.Profile.Reason))
		s.wrap("ssh", sshLine(st.SSH), wide)
		if caller := st.SSH.Caller; caller != nil {
			s.wrap("your session", fmt.Sprintf("%s, %s (%s)", caller.Address, map[bool]string{true: "allowed", false: "NOT allowed"}[caller.Allowed], caller.Reason), wide-1)
		}
		s.wrap("open", openLine(st.Open), wide)
		if len(st.Block) > 0 {
			s.add("block", blockLine(st.Block))
		}
	}
	s.wrap("listening", c.reached, wide-1)
	label := "listening"
	if c.reached != "" {
		label = ""
	}
	switch {
	case wide > 2 && len(c.closed) <= room:
		s.wrapAll(label, c.closed, 2)
	case wide > 2:
		s.list(label, c.closed, room)
	default:
		s.list(label, c.closedCut, room)
	}
	if wide > 2 && len(c.forwarded) <= room {
		s.wrapAll("forwarded", c.forwarded, 2)
	} else {
		s.list("forwarded", c.forwarded, room)
	}
	s.wrap("interfaces", interfacesLine(st.Interfaces), 2)
	if st.Backend.Reason != "" {
		s.add("backend", st.Backend.Reason)
	}
	if desired(st) {
		s.add("persisted", persistedLine(st.Persisted))
		service := serviceLine(st.Service)
		if st.LastVerified != nil {
			service += "; verified " + ago(now, *st.LastVerified)
		}
		s.add("service", service)
		if c := st.Conntrack; c.Max > 0 {
			s.add("conntrack", fmt.Sprintf("%d of %d entries", c.Count, c.Max))
		}
	}
	half := func() int { return max(1, (screenLines-3-len(s.lines))/2) }
	s.list("drift", c.drift, half())
	s.list("foreign", c.foreign, half())
	if wide > 2 {
		s.wrapAll("warning", c.warnings, wide-1)
		return s
	}
	s.list("warning", c.warnings, max(warnings, screenLines-2-len(s.lines)))
	return s
}

// desired reports whether the desired state is known.
func desired(st report.Status) bool { return st.Profile.Name != "" }

func verdict(st report.Status) string {
	switch {
	case st.State == report.Unlocked:
		from := st.Unlock.From
		if len(from) > 1 { // the first line is short
			from = []string{from[0], count(len(from)-1, "other")}
		}
		return fmt.Sprintf("unlocked: %s, until %s", unlockedFor(st.Unlock.All, from), firewall.FormatTime(st.Unlock.Until))
	case st.State != report.Protected:
		return st.Sentence(st.State)
	case len(st.Bypassing()) > 0:
		return fmt.Sprintf("protected, but %s, bypassing this firewall", report.ForwardedVerdict(st.Bypassing()))
	}
	both := "IPv4 and IPv6"
	if st.Families.IPv6 == report.Disabled {
		both = "IPv4; this kernel has no IPv6 (disabled)"
	}
	return st.Sentence(report.Protected) + " on " + both
}

func paint(text, state string, colour bool) string {
	if !colour {
		return text
	}
	code := "31;1" // red
	if state == report.Protected {
		code = "32;1" // green
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

func sshLine(s report.SSHStatus) string {
	ports := make([]string, len(s.Ports))
	for i, p := range s.Ports {
		ports[i] = fmt.Sprint(p)
	}
	allowed := slices.Clone(s.Allow)
	for i, t := range s.Temporary { // the last entries of Allow
		allowed[len(allowed)-len(s.Temporary)+i] += " until " + firewall.FormatTime(t.Until)
	}
	list := strings.Join(allowed, ", ")
	who := "only " + list
	switch {
	case s.Mode == report.Unlocked:
		who = "unlocked"
		if list != "" {
			who += "; afterwards " + list
		}
	case s.Mode == report.Probation:
		who += " until " + firewall.FormatTime(*s.ConfirmBy) + ", then also " + anyAddress(s.Limit) + ", unless confirmed"
	case s.Mode == string(firewall.SSHLimited):
		who = anyAddress(s.Limit)
		if list != "" {
			who += "; without a limit: " + list
		}
	case list == "":
		who = "blocked"
	}
	return fmt.Sprintf("port %s: %s (%s)", strings.Join(ports, ", "), who, s.Reason)
}

// anyAddress returns the text about SSH that is open to any address, with its rate limit.
func anyAddress(limit string) string {
	if limit == "" {
		return "any address, without a limit"
	}
	return "any address, limited to " + limit + " per source"
}

// sshSentence returns sshLine for a desired state.
func sshSentence(st store.State) string { return sshLine(report.SSHOf(st)) }

func openLine(open []report.OpenStatus) string {
	if len(open) == 0 {
		return "only SSH"
	}
	var items []string
	for _, o := range open {
		item := fmt.Sprintf("%s %s/%s", o.Name, o.Ports, o.Proto)
		if o.Ports == "" {
			item = o.Name
			if o.Name != o.Proto {
				item += " " + o.Proto
			}
		}
		if o.Zone != "" && o.Zone != "any" {
			item += " on " + o.Zone
		}
		if len(o.From) == 1 {
			item += " from " + o.From[0]
		} else if len(o.From) > 1 {
			item += fmt.Sprintf(" from %d networks", len(o.From))
		}
		if o.Limit != "" {
			item += " limit " + o.Limit
		}
		if o.Via != "" {
			item += " via " + o.Via
		}
		if o.Until != nil {
			item += " until " + firewall.FormatTime(*o.Until)
		}
		items = append(items, item)
	}
	return strings.Join(items, ", ")
}

func forwardedLine(b firewall.ForwardedPort) string {
	line := b.Family + " " + report.PortText(b)
	if b.On != "" {
		line += " on " + b.On
	}
	line += " to " + b.To
	if b.Program != "" {
		line += " by " + b.Program
	}
	return fmt.Sprintf("%s (%s)", line, b.By)
}

func interfacesLine(list []firewall.Interface) string {
	var items []string
	for _, i := range list {
		if i.Zone != firewall.LoopbackZone {
			items = append(items, fmt.Sprintf("%s %s", i.Name, i.Zone))
		}
	}
	return strings.Join(items, ", ")
}

func persistedLine(files []verify.PersistedFile) string {
	var items []string
	for _, f := range files {
		items = append(items, fmt.Sprintf("%s %s", f.Path, map[bool]string{true: "ok", false: "NOT as configured"}[f.OK]))
	}
	return strings.Join(items, ", ")
}

func serviceLine(s service.Status) string {
	if !s.Registered {
		return "NOT registered: no check at boot"
	}
	return fmt.Sprintf("registered, %s at boot, %s", map[bool]string{true: "enabled", false: "NOT enabled"}[s.Enabled],
		map[bool]string{true: "running", false: "not running"}[s.Active])
}

func ago(now, t time.Time) string {
	d := now.Sub(t).Round(time.Second)
	switch {
	case d < time.Minute:
		return "less than a minute ago"
	case d < 2*time.Hour:
		return count(int(d.Minutes()), "minute") + " ago"
	case d < 48*time.Hour:
		return fmt.Sprintf("%d hours ago", int(d.Hours()))
	}
	return t.Format("2006-01-02 15:04 MST")
}

// count returns a number with its noun, such as "2 packets".
func count(n int, thing string) string {
	if n != 1 {
		thing += "s"
	}
	return fmt.Sprintf("%d %s", n, thing)
}
