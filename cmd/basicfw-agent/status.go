package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/basicfw/basicfw-agent/agent"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/settings"
	"github.com/basicfw/basicfw-agent/agent/store"
	"github.com/basicfw/basicfw-agent/agent/system"
)

func (a *app) statusCmd() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Tell where this machine stands",
		Long: `Tell where this machine stands: the verdict first, then what was decided and
why, and last the one command to run next, if any. Exit code 0 is protected,
3 is not protected, 4 is not bootstrapped.`,
		Args: noArgs,
		RunE: a.forRoot(func(ctx context.Context, w *wiring) error {
			// Settings that are wrong now do not change how the machine stands.
			s, settingsErr := settings.Load(a.sys, a.config)
			facts, err := w.facts(s, true)
			if err != nil {
				return err
			}
			st, err := w.agent.Status(ctx, facts)
			if err != nil {
				return err
			}
			// What differs may be a change that is under way. If it takes long, it
			// is told as it is.
			if len(st.Drift) > 0 {
				lockCtx, cancel := context.WithTimeout(ctx, settleWait)
				defer cancel()
				if unlock, err := w.agent.Store.Lock(lockCtx, "status"); err == nil {
					defer unlock()
					if st, err = w.agent.Status(ctx, facts); err != nil {
						return err
					}
				}
			}
			if settingsErr != nil {
				st.Warnings = append(st.Warnings, "the settings are wrong, and apply would refuse them: "+firstLine(settingsErr.Error()))
			}
			if asJSON {
				data, err := json.MarshalIndent(st, "", "  ")
				if err != nil {
					return err
				}
				if _, err := a.terminal.Write(append(system.PrintableJSON(data), '\n')); err != nil {
					return err
				}
			} else {
				printStatus(a.terminal, st, time.Now(), coloured(a.terminal))
			}
			if code := st.ExitCode(); code != 0 {
				return &silentError{code}
			}
			return nil
		}),
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON, with keys that stay")
	return cmd
}

// coloured tells whether w is a terminal that wants colours (no-color.org).
func coloured(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok || os.Getenv("NO_COLOR") != "" || os.Getenv("TERM") == "dumb" {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// The screen that status fits on.
const (
	screenWidth = 80
	screenLines = 24
	labelWidth  = 12
)

// screen collects lines: each with a label, cut to the screen's width.
type screen struct{ lines []string }

func (s *screen) add(label, text string) { s.wrap(label, text, 1) }

// wrap adds a text that may take several lines.
func (s *screen) wrap(label, text string, max int) {
	words := strings.Fields(system.Printable(text))
	for n := 0; n < max && len(words) > 0; n++ {
		line, room := "", screenWidth-labelWidth
		for len(words) > 0 {
			w := words[0]
			if line != "" {
				w = line + " " + w
			}
			if utf8.RuneCountInString(w) > room && line != "" && n < max-1 {
				break
			}
			line, words = w, words[1:]
		}
		if r := []rune(line); len(r) > room {
			line = string(r[:room-3]) + "..."
		}
		s.lines = append(s.lines, fmt.Sprintf("%-*s%s", labelWidth, label, line))
		label = ""
	}
}

// list adds at most max lines, and says how many more there are.
func (s *screen) list(label string, items []string, max int) {
	for i, item := range items {
		if max == 1 && len(items) > 1 {
			s.add(label, fmt.Sprintf("(%d more) %s", len(items)-1, item))
			return
		}
		if i == max-1 && len(items) > max {
			s.add(label, fmt.Sprintf("and %d more: basicfw-agent status --json", len(items)-i))
			return
		}
		s.add(label, item)
		label = ""
	}
}

// printStatus writes the status for people: the verdict first, the next
// command last, all on one screen. Closed listeners and forwarded ports are all
// named where there is room.
func printStatus(out io.Writer, st agent.Status, now time.Time, colour bool) {
	most := max(len(st.Listening), len(st.Bypass), 2)
	var s screen
search:
	for wide := 4; wide >= 2; wide-- {
		for room := most; room >= 2; room-- {
			if s = layOut(st, now, room, wide); len(s.lines) <= screenLines-2 {
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

// layOut is what stands between the verdict and the next command. At most room
// lines are for closed listeners, and as many for forwarded ports; wide is how
// many lines a long list may take, 2 at least. What is left is for what is
// wrong.
func layOut(st agent.Status, now time.Time, room, wide int) screen {
	var s screen
	warnings := min(len(st.Warnings), 3) // listeners make way for as many
	if len(st.Drift)+len(st.Foreign) > 0 {
		room, wide, warnings = min(room, 2), 2, 1
	}
	if st.Why != "" {
		s.wrap("why", st.Why, 2)
	}
	if decided(st) {
		s.add("profile", fmt.Sprintf("%s: %s", st.Profile.Name, st.Profile.Reason))
		s.wrap("ssh", sshLine(st.SSH), wide)
		if st.SSH.You != "" {
			s.wrap("you", fmt.Sprintf("%s, who may %slog in again: %s", st.SSH.You, map[bool]string{false: "NOT "}[st.SSH.YouMay], st.SSH.YouWhy), wide-1)
		}
		s.wrap("open", openLine(st.Open), wide)
	}
	open, closed := listeningLines(st.Listening, wide == 2)
	s.wrap("listening", open, wide-1)
	label := "listening"
	if open != "" {
		label = ""
	}
	if wide > 2 && len(closed) <= room {
		for _, line := range closed {
			s.wrap(label, line, 2)
			label = ""
		}
	} else {
		s.list(label, closed, room)
	}
	s.list("forwarded", bypassLines(st.Bypass), room)
	s.wrap("interfaces", interfacesLine(st.Interfaces), 2)
	if st.Backend.Reason != "" {
		s.add("backend", st.Backend.Reason)
	}
	if decided(st) {
		s.add("persisted", persistedLine(st.Persisted))
		service := serviceLine(st.Service)
		if st.LastVerified != nil {
			service += "; verified " + ago(now, *st.LastVerified)
		}
		s.add("service", service)
		if c := st.Conntrack; c.Max > 0 {
			s.add("connections", fmt.Sprintf("%d of at most %d that the kernel tracks", c.Count, c.Max))
		}
	}
	var drift, foreign []string
	for _, d := range st.Drift {
		drift = append(drift, d.String())
	}
	for _, f := range st.Foreign {
		foreign = append(foreign, fmt.Sprintf("%s %s: %s", f.Family, f.Rule, f.Effect))
	}
	half := func() int { return max(1, (screenLines-3-len(s.lines))/2) }
	s.list("drift", drift, half())
	s.list("foreign", foreign, half())
	if wide > 2 {
		label := "warning"
		for _, w := range st.Warnings {
			s.wrap(label, w, wide-1)
			label = ""
		}
		return s
	}
	s.list("warning", st.Warnings, max(warnings, screenLines-2-len(s.lines)))
	return s
}

// decided tells whether it is known what was decided for the machine.
func decided(st agent.Status) bool { return st.Profile.Name != "" }

func verdict(st agent.Status) string {
	switch st.State {
	case agent.Protected:
		both := "IPv4 and IPv6"
		if st.Families.IPv6 == "disabled" {
			both = "IPv4; this kernel has no IPv6 (disabled)"
		}
		if len(st.Bypass) > 0 {
			return fmt.Sprintf("protected, but %s past this firewall", agent.BypassVerdict(st.Bypass))
		}
		admits := 0
		for _, f := range st.Foreign {
			if f.Admits {
				admits++
			}
		}
		if admits > 0 {
			return fmt.Sprintf("protected, but %s of others in INPUT let more in", count(admits, "rule"))
		}
		return fmt.Sprintf("protected: profile %s on %s", st.Profile.Name, both)
	case agent.PendingState:
		return "pending: new rules stand, and go at " + firewall.FormatTime(st.Pending.Until) + " unless confirmed"
	case agent.Unlocked:
		from := st.Unlock.From
		if len(from) > 1 { // the first line is short
			from = []string{from[0], count(len(from)-1, "other")}
		}
		return fmt.Sprintf("unlocked: %s, until %s", unlockedFor(st.Unlock.All, from), firewall.FormatTime(st.Unlock.Until))
	case agent.NotBootstrapped:
		return "not bootstrapped: nothing is closed by basicfw-agent"
	case agent.Drifted:
		return "drifted: this machine is not as it was decided"
	case agent.FailsafeState:
		return "failsafe: closed, with SSH open to any address, limited"
	}
	return st.State + ": ports are open that should be closed"
}

func paint(text, state string, colour bool) string {
	if !colour {
		return text
	}
	code := "31;1" // red
	if state == agent.Protected {
		code = "32;1" // green
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

func sshLine(s agent.SSHStatus) string {
	ports := make([]string, len(s.Ports))
	for i, p := range s.Ports {
		ports[i] = fmt.Sprint(p)
	}
	var allowed []string
	for i, who := range s.Allow {
		if t := i - (len(s.Allow) - len(s.Timed)); t >= 0 {
			who += " until " + firewall.FormatTime(s.Timed[t].Until)
		}
		allowed = append(allowed, who)
	}
	list := strings.Join(allowed, ", ")
	who := "only " + list
	switch {
	case s.Mode == agent.Unlocked:
		who = "unlocked for a while"
		if list != "" {
			who += "; afterwards " + list
		}
	case s.Mode == agent.Probation:
		who += " until " + firewall.FormatTime(*s.ConfirmBy) + ", then " + anyAddress(s.Limit) + " too, unless confirmed"
	case s.Mode == string(firewall.SSHLimited):
		who = anyAddress(s.Limit)
		if list != "" {
			who += "; without limit " + list
		}
	case list == "":
		who = "nobody"
	}
	return fmt.Sprintf("port %s: %s (%s)", strings.Join(ports, ", "), who, s.Reason)
}

// anyAddress says that any address may log in, within a limit.
func anyAddress(limit string) string {
	if limit == "" {
		return "any address, without a limit"
	}
	return "any address, limited to " + limit + " from each"
}

// sshSentence is sshLine of a decision.
func sshSentence(st store.State) string { return sshLine(agent.SSHOf(st)) }

func openLine(open []agent.OpenStatus) string {
	if len(open) == 0 {
		return "nothing but SSH"
	}
	var items []string
	for _, o := range open {
		item := fmt.Sprintf("%s %s/%s", o.Name, o.Ports, o.Proto)
		if o.Zone != "" && o.Zone != "any" {
			item += " on " + o.Zone
		}
		if len(o.From) == 1 {
			item += " from " + o.From[0]
		} else if len(o.From) > 1 {
			item += fmt.Sprintf(" from %d networks", len(o.From))
		}
		if o.Until != nil {
			item += " until " + firewall.FormatTime(*o.Until)
		}
		items = append(items, item)
	}
	return strings.Join(items, ", ")
}

func openSentence(d firewall.Desired) string { return openLine(agent.OpenOf(d)) }

// listeningLines says of each listener whether it can be reached from outside:
// those that can in one line, and for each of the others the command that
// opens it. In a short line the command is worth more than the process.
func listeningLines(list []agent.ListeningStatus, short bool) (open string, closed []string) {
	var reached []string
	for _, l := range list {
		at := fmt.Sprintf("%d/%s", l.Port, l.Proto)
		who := strings.TrimSpace(at + " " + system.Printable(l.Process))
		if l.Reachable {
			reached = append(reached, who)
			continue
		}
		line := who + ": closed; open it: " + l.OpenWith
		if short && utf8.RuneCountInString(line) > screenWidth-labelWidth {
			line = at + ": closed; open it: " + l.OpenWith
		}
		closed = append(closed, line)
	}
	if len(reached) > 0 {
		open = "open: " + strings.Join(reached, ", ")
	}
	return open, closed
}

func bypassLines(list []firewall.Bypass) []string {
	var out []string
	for _, b := range list {
		out = append(out, bypassLine(b))
	}
	return out
}

func bypassLine(b firewall.Bypass) string {
	line := b.Family + " " + agent.PortText(b)
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

func persistedLine(files []agent.PersistedFile) string {
	var items []string
	for _, f := range files {
		items = append(items, fmt.Sprintf("%s %s", f.Path, map[bool]string{true: "ok", false: "NOT as decided"}[f.OK]))
	}
	return strings.Join(items, ", ")
}

func serviceLine(s agent.ServiceStatus) string {
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

// count is a number of things, in words.
func count(n int, thing string) string {
	if n != 1 {
		thing += "s"
	}
	return fmt.Sprintf("%d %s", n, thing)
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(s, "\n")
	return line
}
