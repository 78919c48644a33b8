package store

import (
	"net/netip"
	"strings"
)

// Origin returns the setting that is the reason for one of our own rules: the file and line
// of a service or of a list of blocked networks, or why a source may log in over SSH. name is
// the text after "basicfw-" in the rule's comment. It returns "" for a rule of the baseline.
func (st State) Origin(name string, from netip.Addr) string {
	for _, s := range st.Desired.Services() {
		if s.Name == name {
			return s.Source
		}
	}
	if list, ok := strings.CutPrefix(name, "block-"); ok {
		for _, b := range st.Desired.Blocks {
			if b.Name == list {
				return b.Source
			}
		}
	}
	if by, ok := st.Desired.SSH.AllowedBy(from); ok && name == "ssh" {
		for _, a := range st.Allowed {
			if a.From == by.From && a.Until.Equal(by.Until) && a.Source != "" {
				return a.Source
			}
		}
		return st.WhyAllowed(by.From, by.Until)
	}
	if strings.HasPrefix(name, "ssh-limit") {
		return st.Client.Why()
	}
	return ""
}
