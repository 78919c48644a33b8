package firewall

import (
	"fmt"
	"slices"
)

// Kinds of Drift.
const (
	Missing = "missing" // wanted and not there
	Extra   = "extra"   // there and not wanted
	Altered = "altered" // there in another form, or in another place
)

// Drift is one difference between what is wanted and what there is.
type Drift struct {
	Family string `json:"family"` // "ipv4", "ipv6", or "" for what has none
	Chain  string `json:"chain"`  // a chain, or the path of a file
	Kind   string `json:"kind"`
	Want   string `json:"want"`
	Got    string `json:"got"`
}

// String is the drift as one line for people.
func (d Drift) String() string {
	where := d.Chain
	if d.Family != "" {
		where = d.Family + " " + d.Chain
	}
	switch d.Kind {
	case Missing:
		return fmt.Sprintf("%s: missing: %s", where, d.Want)
	case Extra:
		return fmt.Sprintf("%s: extra: %s", where, d.Got)
	}
	return fmt.Sprintf("%s: altered: %s, want %s", where, d.Got, d.Want)
}

// Foreign is a rule of another program, or of a person, that decides about
// packets to this host beside ours.
type Foreign struct {
	Family string `json:"family"`
	Chain  string `json:"chain"`
	Rule   string `json:"rule"`
	Effect string `json:"effect"`
	// Admits is set where the rule lets more in than we do: of a protocol and
	// some ports, where it says any; else it may be of all.
	Admits bool        `json:"-"`
	Proto  Proto       `json:"-"`
	Ports  []PortRange `json:"-"`
}

// Reaches tells whether the rule lets somebody in to a port.
func (f Foreign) Reaches(proto Proto, port uint16) bool {
	return f.Admits && (f.Proto == "" || f.Proto == proto) &&
		(len(f.Ports) == 0 || slices.ContainsFunc(f.Ports, func(r PortRange) bool { return r.Contains(port) }))
}

// Lines compares two lists of lines and gives what has to happen to got for it
// to become want: a shortest list of drifts, in order, where one line taken
// away and another put in its place is one Altered.
func Lines(family, chain string, want, got []string) []Drift {
	// Where both are the same, as nearly always, the table is not needed.
	for len(want) > 0 && len(got) > 0 && want[0] == got[0] {
		want, got = want[1:], got[1:]
	}
	for len(want) > 0 && len(got) > 0 && want[len(want)-1] == got[len(got)-1] {
		want, got = want[:len(want)-1], got[:len(got)-1]
	}
	if len(want)*len(got) > 1<<24 {
		return []Drift{{family, chain, Altered, fmt.Sprintf("%d lines", len(want)), fmt.Sprintf("%d other lines", len(got))}}
	}
	// common[i][j] is the length of the longest common subsequence of want[i:]
	// and got[j:].
	common := make([][]int, len(want)+1)
	for i := range common {
		common[i] = make([]int, len(got)+1)
	}
	for i := len(want) - 1; i >= 0; i-- {
		for j := len(got) - 1; j >= 0; j-- {
			if want[i] == got[j] {
				common[i][j] = common[i+1][j+1] + 1
			} else {
				common[i][j] = max(common[i+1][j], common[i][j+1])
			}
		}
	}
	var drifts []Drift
	var missing, extra []string
	flush := func() {
		for len(missing) > 0 || len(extra) > 0 {
			switch {
			case len(missing) > 0 && len(extra) > 0:
				drifts = append(drifts, Drift{family, chain, Altered, missing[0], extra[0]})
				missing, extra = missing[1:], extra[1:]
			case len(missing) > 0:
				drifts = append(drifts, Drift{family, chain, Missing, missing[0], ""})
				missing = missing[1:]
			default:
				drifts = append(drifts, Drift{family, chain, Extra, "", extra[0]})
				extra = extra[1:]
			}
		}
	}
	i, j := 0, 0
	for i < len(want) || j < len(got) {
		switch {
		case i < len(want) && j < len(got) && want[i] == got[j]:
			flush()
			i, j = i+1, j+1
		case j == len(got) || i < len(want) && common[i+1][j] >= common[i][j+1]:
			missing = append(missing, want[i])
			i++
		default:
			extra = append(extra, got[j])
			j++
		}
	}
	flush()
	return drifts
}
