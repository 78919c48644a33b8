//go:build linux

package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/basicfw/basicfw-agent/agent"
	"github.com/basicfw/basicfw-agent/agent/exposure"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/system"
)

func (a *app) exposureCmd() *cobra.Command {
	var asJSON bool
	var from, on string
	cmd := &cobra.Command{
		Use:   "exposure",
		Short: "Show who reaches which ports, over the rules of all programs",
		Long: `Show which ports new connections reach, from the internet and from each other
network: a row for each listener, configured service and port that a rule names,
and below it the rule that decides. All tables of iptables and nftables count,
whichever program has loaded them. No packet is sent, and neither bootstrap nor
the service is needed.

  open      from any address, or all but a few
  limited   from any address, within a limit of rate or time
  some      only from some addresses
  perhaps   depends on a rule that this program cannot evaluate
  closed    from no address`,
		Example: `  basicfw-agent exposure
  basicfw-agent exposure --from 203.0.113.9 --on eth0`,
		Args: noArgs,
	}
	cmd.RunE = func(_ *cobra.Command, args []string) error {
		var source netip.Addr
		if cmd.Flags().Changed("from") {
			var err error
			if source, err = parseAddress("--from", from); err != nil {
				return err
			}
		}
		return a.readOnly(func(ctx context.Context, machine *agent.Agent) error {
			s, err := machine.Situation(ctx)
			if err != nil {
				return err
			}
			if _, err := s.Interface(on); on != "" && err != nil {
				return usageError{err}
			}
			s.From, s.On = source, on
			report := s.Report()
			if report.Omitted > 0 {
				a.log.Warnf("%s that rules name were not examined", count(report.Omitted, "port"))
			}
			if asJSON {
				return a.printJSON(report)
			}
			printExposure(a.terminal, report, coloured(a.terminal))
			return nil
		})(cmd, args)
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.Flags().StringVar(&from, "from", "", "only connections from this address")
	cmd.Flags().StringVar(&on, "on", "", "only connections that arrive on this interface")
	a.completeFlags(cmd, map[string]completer{"on": a.interfaceNames, "from": noWords})
	return cmd
}

// parseAddress parses the value of a flag.
func parseAddress(flag, text string) (netip.Addr, error) {
	addr, err := netip.ParseAddr(strings.TrimSpace(text))
	if err != nil || addr.Zone() != "" {
		return addr, usageError{fmt.Errorf("%s %s: want an address, such as 203.0.113.9", flag, firewall.Quote(text))}
	}
	return addr.Unmap(), nil
}

// column is a network from which packets arrive.
type column struct {
	head       string
	interfaces []string
	cells      []string
}

// columnsOf returns a column for all public interfaces, one for all private ones, and
// one for each other interface.
func columnsOf(interfaces []firewall.Interface) []column {
	var out []column
	for _, i := range interfaces {
		head := system.Printable(i.Name)
		switch i.Zone {
		case firewall.PublicZone:
			head = "internet"
		case firewall.PrivateZone:
			head = "private"
		}
		at := slices.IndexFunc(out, func(c column) bool { return c.head == head })
		if at < 0 {
			at = len(out)
			out = append(out, column{head: head})
		}
		out[at].interfaces = append(out[at].interfaces, i.Name)
	}
	order := []string{"private", "internet"}
	slices.SortStableFunc(out, func(a, b column) int { return cmp.Compare(slices.Index(order, b.head), slices.Index(order, a.head)) })
	return out
}

// words are the contents of the cells with their colours, the most open first.
var words = []struct{ word, colour string }{{"open", "32;1"}, {"limited", "33;1"}, {"some", "33"}, {"perhaps", "35;1"}, {"closed", "2"}}

// cell returns how far a port is open on one of some interfaces. If the families differ,
// it names that of the answer.
func cell(entries []exposure.Entry, interfaces []string) string {
	best := map[string]int{}
	for _, on := range interfaces {
		for _, family := range []string{"ipv4", "ipv6"} {
			var open, perhaps, closed *exposure.Entry
			for i, e := range entries {
				if e.Family == family && (len(e.On) == 0 || slices.Contains(e.On, on)) {
					*map[string]**exposure.Entry{exposure.Open: &open, exposure.Perhaps: &perhaps, exposure.Closed: &closed}[e.Verdict] = &entries[i]
				}
			}
			rank := 4
			switch {
			case open != nil && open.Most:
				rank = 0
			case perhaps != nil && perhaps.Limited && (open == nil || perhaps.Most):
				rank = 1
			case open != nil:
				rank = 2
			case perhaps != nil:
				rank = 3
			case closed == nil:
				continue // no address of this family
			}
			if b, ok := best[family]; !ok || rank < b {
				best[family] = rank
			}
		}
	}
	v4, ok4 := best["ipv4"]
	v6, ok6 := best["ipv6"]
	switch {
	case !ok4 && !ok6:
		return "-"
	case !ok6, ok4 && v4 == v6:
		return words[v4].word
	case !ok4:
		return words[v6].word
	case v4 < v6:
		return words[v4].word + " v4"
	}
	return words[v6].word + " v6"
}

// The layout of the matrix, in columns of the screen.
const (
	portWidth = 24
	cellWidth = 11
	maxClosed = 20 // rows of closed ports
)

// printExposure prints the matrix, and below it the rules that open ports.
func printExposure(out io.Writer, r exposure.Report, colour bool) {
	columns := columnsOf(r.Interfaces)
	if len(columns) == 0 {
		fmt.Fprintln(out, "no interface has an address")
		return
	}
	var rows [][]exposure.Entry
	closed := 0
	for _, row := range rowsOf(r.Exposure) {
		if !slices.ContainsFunc(row, func(e exposure.Entry) bool { return e.Verdict != exposure.Closed }) && row[0].Port != 0 {
			if row[0].Named {
				continue
			}
			if closed++; closed > maxClosed {
				continue
			}
		}
		rows = append(rows, row)
	}
	for i := range columns {
		for _, row := range rows {
			columns[i].cells = append(columns[i].cells, cell(row, columns[i].interfaces))
		}
	}
	columns = joined(columns)
	for len(columns) > 0 {
		n := min(len(columns), (screenWidth-portWidth)/cellWidth)
		printMatrix(out, rows, columns[:n], colour)
		if columns = columns[n:]; len(columns) > 0 {
			fmt.Fprintln(out)
		}
	}
	if closed > maxClosed {
		fmt.Fprintf(out, "and %s: closed\n", count(closed-maxClosed, "other port"))
	}
	printReasons(out, rows)
}

// printReasons prints why ports are open. Ports with the same reasons are listed together.
func printReasons(out io.Writer, rows [][]exposure.Entry) {
	var keys []string
	ports := map[string][]string{}
	for _, row := range rows {
		key := strings.Join(reasons(row), "\n")
		if key != "" && ports[key] == nil {
			keys = append(keys, key)
		}
		ports[key] = append(ports[key], portText(row[0]))
	}
	for i, key := range keys {
		if i == 0 {
			fmt.Fprintln(out)
		}
		label := strings.Join(ports[key], ", ")
		if len(ports[key]) > 1 {
			fmt.Fprintln(out, cut(label, screenWidth))
			label = ""
		}
		for _, l := range strings.Split(key, "\n") {
			fmt.Fprintln(out, cut(fmt.Sprintf("%-*s%s", labelWidth, label, l), screenWidth))
			label = ""
		}
	}
}

// joined merges columns of single interfaces that have equal cells.
func joined(columns []column) []column {
	var out []column
	for _, c := range columns {
		i := slices.IndexFunc(out, func(o column) bool {
			return o.head != "internet" && o.head != "private" && c.head != "private" && slices.Equal(o.cells, c.cells)
		})
		if i < 0 {
			out = append(out, c)
			continue
		}
		out[i].interfaces = append(out[i].interfaces, c.interfaces...)
		more := fmt.Sprintf(" +%d", len(out[i].interfaces)-1)
		out[i].head = cut(system.Printable(out[i].interfaces[0]), cellWidth-1-len(more)) + more
	}
	return out
}

// rowsOf returns the entries of each port.
func rowsOf(list []exposure.Entry) (rows [][]exposure.Entry) {
	for _, e := range list {
		if n := len(rows); n > 0 && rows[n-1][0].Port == e.Port && rows[n-1][0].Proto == e.Proto {
			rows[n-1] = append(rows[n-1], e)
		} else {
			rows = append(rows, []exposure.Entry{e})
		}
	}
	return rows
}

func printMatrix(out io.Writer, rows [][]exposure.Entry, columns []column, colour bool) {
	line := fmt.Sprintf("%-*s", portWidth, "PORT")
	for _, c := range columns {
		line += fmt.Sprintf("%-*s", cellWidth, cut(c.head, cellWidth-1))
	}
	fmt.Fprintln(out, strings.TrimRight(line, " "))
	for i, row := range rows {
		who := portText(row[0])
		for _, e := range row {
			if e.Process != "" {
				who = portText(e) + " " + system.Printable(e.Process)
				break
			}
		}
		line := fmt.Sprintf("%-*s", portWidth, cut(who, portWidth-1))
		for j, c := range columns {
			text := c.cells[i]
			if j < len(columns)-1 {
				text = fmt.Sprintf("%-*s", cellWidth, text)
			}
			line += painted(text, colour)
		}
		fmt.Fprintln(out, line)
	}
}

func painted(text string, colour bool) string {
	for _, w := range words {
		if colour && strings.HasPrefix(text, w.word) {
			return "\x1b[" + w.colour + "m" + text + "\x1b[0m"
		}
	}
	return text
}

func portText(e exposure.Entry) string {
	if e.Port == 0 && e.Proto.HasPorts() {
		return fmt.Sprintf("other/%s", e.Proto)
	}
	return firewall.FormatPorts(firewall.Port(e.Port), e.Proto)
}

// reasons returns lines for each way in which a port is open or perhaps is: from where, which
// setting requests it, and the rule that decides. Equal reasons of both families are merged.
func reasons(row []exposure.Entry) (lines []string) {
	type reason struct {
		what, why        string
		by               exposure.Decision
		over             []string // the packets' families
		families, chains []string // of the tables
	}
	var all []*reason
	for _, e := range row {
		if e.Verdict == exposure.Closed {
			continue
		}
		r := &reason{what: whatOpen(e), by: e.By}
		if !e.Limited {
			r.why = strings.Join(e.Why, ", ")
		}
		r.by.Family, r.by.Chain = "", ""
		if i := slices.IndexFunc(all, func(o *reason) bool { return o.what == r.what && o.why == r.why && o.by == r.by }); i >= 0 {
			r = all[i]
		} else {
			all = append(all, r)
		}
		r.over = append(r.over, e.Family)
		r.families, r.chains = append(r.families, e.By.Family), append(r.chains, e.By.Chain)
	}
	for _, r := range all {
		r.by.Family = strings.Join(slices.Compact(r.families), "/")
		r.by.Chain = strings.Join(slices.Compact(r.chains), "/")
		what := r.what
		if slices.ContainsFunc(row, func(e exposure.Entry) bool { return !slices.Contains(r.over, e.Family) }) {
			what = strings.Replace(what, "any address", map[string]string{"ipv4": "any IPv4 address", "ipv6": "any IPv6 address"}[r.over[0]], 1)
		}
		lines = append(lines, system.Printable(what))
		if source := system.Printable("(" + r.by.Source + ")"); r.by.Source != "" {
			if last := &lines[len(lines)-1]; utf8.RuneCountInString(*last+" "+source) <= screenWidth-labelWidth {
				*last += " " + source
			} else {
				lines = append(lines, source)
			}
		}
		if r.why != "" {
			lines = append(lines, "depends on "+system.Printable(r.why))
		}
		lines = append(lines, "by "+system.Printable(ruleText(r.by)))
	}
	return lines
}

// ruleText returns the place of a rule and its text.
func ruleText(d exposure.Decision) string {
	if d.Chain == "" {
		return d.Rule
	}
	text := fmt.Sprintf("%s %s %s: %s", d.Family, d.Table, d.Chain, d.Rule)
	if d.Program == "iptables-legacy" {
		text = d.Program + " " + text
	}
	return text
}

// whatOpen returns from where a port is open.
func whatOpen(e exposure.Entry) string {
	text := "open to "
	switch {
	case e.Limited:
		text = "open, limited, to "
	case e.Verdict == exposure.Perhaps:
		text = "perhaps open to "
	}
	switch {
	case len(e.From) > 0:
		text += networks(e.From)
	case len(e.Except) > 0:
		text += "any address except " + networks(e.Except)
	default:
		text += "any address"
	}
	if e.Container != "" {
		text += ", forwarded to " + e.Container + ","
	}
	if len(e.On) > 0 {
		text += " on " + some(e.On, len(e.On)-most)
	}
	return strings.TrimSuffix(text, ",")
}

func networks(s exposure.Sources) string {
	list := s.Networks()
	return some(firewall.FormatPrefixes(list[:min(len(list), most)]), len(list)-most)
}

// most is the number of networks or interfaces that are listed.
const most = 3

// some returns the first items of a list, and how many more there are.
func some(list []string, more int) string {
	text := strings.Join(list[:min(len(list), most)], ", ")
	if more > 0 {
		text += fmt.Sprintf(" and %d more", more)
	}
	return text
}

// cut shortens a text to a width.
func cut(text string, width int) string {
	if utf8.RuneCountInString(text) <= width {
		return text
	}
	return string([]rune(text)[:width-3]) + "..."
}
