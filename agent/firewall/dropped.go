package firewall

// Dropped is the number of packets that one of our rules has dropped since it was loaded.
type Dropped struct {
	Family  string // of the rule: "ipv4", "ipv6", or "inet" for both
	Rule    string // its comment without "basicfw-", or Policy
	Packets uint64
}

// Policy is the rule that drops what no other rule accepts.
const Policy = "policy"
