package firewall

// Before is what Load changes outside our own chains, as it was: what Remove
// gives back.
type Before struct {
	IPv4 FamilyBefore `json:"ipv4"`
	IPv6 FamilyBefore `json:"ipv6"`
}

// FamilyBefore is one family's part of Before.
type FamilyBefore struct {
	Input  string `json:"input"`  // INPUT's policy
	Output string `json:"output"` // OUTPUT's policy
	// Removed are the rules that were taken out of INPUT, in their order, as
	// iptables-save writes them behind "-A INPUT ".
	Removed []string `json:"removed,omitempty"`
	// Places are for each of Removed how many of the rules that stayed stood
	// before it, and Stayed is a checksum of those: where they are the same
	// later, all can be in the former order again. The rules themselves are
	// other programs' and are kept nowhere.
	Places []int  `json:"places,omitempty"`
	Stayed string `json:"stayed,omitempty"`
}

// Family gives a family's part, to read or to change.
func (b *Before) Family(f Family) *FamilyBefore {
	if f == IPv4 {
		return &b.IPv4
	}
	return &b.IPv6
}

// Finding is something that follows from what is in the kernel.
type Finding struct {
	Family Family
	Why    string // a sentence
	Next   string // the command that mends it where a repair does not; or ""
}

// Inspection is what a backend found in the kernel, compared with a ruleset.
type Inspection struct {
	// Backend is the program and its version: "iptables 1.8.9 (nf_tables)".
	Backend string
	// Present is set where a chain of ours is there in any family.
	Present bool
	// Drift is how the kernel differs from the ruleset; none is as it should be.
	Drift []Drift
	// Open and Shut say where that leaves ports open that should be closed, or
	// everybody shut out.
	Open, Shut []Finding
	// Flushed are the families in which no rule of ours is left.
	Flushed []Family
	// Foreign are others' rules in INPUT that decide about packets to us.
	Foreign []Foreign
	// Bypass are the ports that are forwarded past INPUT.
	Bypass []Bypass
	// Managers are other firewall programs whose chains are in INPUT's way.
	Managers []string
	// Warnings are sentences about what else decides about packets here.
	Warnings []string
	// Before is how things are now: the policies, and the deciding rules of
	// INPUT that Load takes out where it is told to.
	Before Before
	// Snapshot is the backend's own record of what it saw, for Load and Revert.
	Snapshot any
}
