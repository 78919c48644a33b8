package nftables

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/basicfw/basicfw-agent/agent/exposure"
	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// liveFamilies are the families whose tables see packets to this host or through it.
var liveFamilies = []struct {
	name   string
	number byte
}{{"netdev", unix.NFPROTO_NETDEV}, {"inet", unix.NFPROTO_INET}, {"ip", unix.NFPROTO_IPV4}, {"ip6", unix.NFPROTO_IPV6}}

// liveTable is a table as the kernel has it.
type liveTable struct {
	name   string
	chains []*liveChain
}

type liveChain struct {
	exposure.Chain
	base  bool
	rules []rule
}

// Live returns the tables of all programs. saved are the tables that iptables-save printed: it
// decodes iptables' extensions, which nf_tables stores in a format of their own, and it includes
// the tables of the legacy variant. Live puts the contents of ipsets into their matches.
//
// Without bans, our own table's rules for blocked sources are omitted.
func Live(saved []exposure.Table, bans bool) (out []exposure.Table, err error) {
	exposure.ResolveSets(saved, ipsets())
	var xtables, legacy []exposure.Table
	for _, t := range saved {
		if t.Program == "iptables" {
			xtables = append(xtables, t)
		} else {
			legacy = append(legacy, t)
		}
	}
	marks := slices.ContainsFunc(legacy, func(t exposure.Table) bool {
		return slices.ContainsFunc(t.Chains, func(c exposure.Chain) bool {
			return slices.ContainsFunc(c.Rules, func(r exposure.Rule) bool { return strings.Contains(r.Text, "-j CONNMARK") })
		})
	})
	s, err := dial()
	if absent(err) {
		return legacy, nil
	}
	if err == nil {
		defer s.close()
		for n := 1; ; n++ {
			out, err = live(s, xtables, marks, bans)
			if err == nil || n == readTries || !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.ENOENT) {
				break
			}
		}
	}
	if absent(err) {
		return legacy, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading the rules of nf_tables: %w", err)
	}
	return append(out, legacy...), nil
}

// live reads nf_tables; marks is set if a connection may have a mark.
func live(s *socket, saved []exposure.Table, marks, bans bool) ([]exposure.Table, error) {
	before, err := generation(s)
	if err != nil {
		return nil, err
	}
	read := make([][]*liveTable, len(liveFamilies))
	for i, f := range liveFamilies {
		s.family = f.number
		if read[i], err = liveTables(s); err != nil {
			return nil, err
		}
		for _, t := range read[i] {
			marks = marks || slices.ContainsFunc(t.chains, func(c *liveChain) bool { return slices.ContainsFunc(c.rules, setsConnectionMark) })
		}
	}
	var out []exposure.Table
	links := &links{}
	for i, f := range liveFamilies {
		s.family = f.number
		for _, t := range read[i] {
			of := &translator{family: f.name, sets: &liveSets{socket: s, table: t.name}, links: links, marks: marks}
			table := exposure.Table{Program: "nft", Family: f.name, Name: t.name}
			at := slices.IndexFunc(saved, func(s exposure.Table) bool { return s.Family == f.name && s.Name == t.name })
			if at >= 0 {
				table.Program = saved[at].Program
			}
			for _, c := range t.chains {
				var text []exposure.Rule
				if at >= 0 {
					text = savedRules(saved[at], c)
				}
				if !bans && t.name == TableName && exposure.Bans(t.name, c.Name) {
					// Reading the sets takes the kernel a second for 100,000 networks.
				} else if c.Rules, err = of.chain(c, text); err != nil {
					return nil, err
				}
				table.Chains = append(table.Chains, c.Chain)
			}
			out = append(out, table)
		}
	}
	after, err := generation(s)
	if err == nil && !bytes.Equal(before, after) {
		err = unix.EINTR
	}
	return out, err
}

// Misprinted reports whether iptables-save prints a rule of INPUT without some of its
// matches, because another program added it over nf_tables: "ip saddr @bad drop"
// becomes "-j DROP". text is its output for the family.
func Misprinted(f firewall.Family, text []byte) (bool, error) {
	name := firewall.ByFamily(f, "ip", "ip6")
	saved, _, err := exposure.ReadSave("iptables", name, text)
	if err != nil {
		return false, err
	}
	s, err := dial()
	if err != nil {
		return false, err
	}
	defer s.close()
	s.family = firewall.ByFamily[byte](f, unix.NFPROTO_IPV4, unix.NFPROTO_IPV6)
	tables, err := liveTables(s)
	if err != nil {
		return false, err
	}
	const table, chain = "filter", "INPUT"
	at := slices.IndexFunc(saved, func(t exposure.Table) bool { return t.Name == table })
	for _, t := range tables {
		of := &translator{family: name, sets: &liveSets{socket: s, table: t.name}, links: &links{}}
		for _, c := range t.chains {
			if t.name != table || c.Name != chain || at < 0 {
				continue
			}
			printed := savedRules(saved[at], c)
			for i, r := range c.rules {
				if printed == nil {
					break
				}
				one, err := of.chain(&liveChain{rules: []rule{r}}, nil)
				if err != nil {
					return false, err
				}
				if of.native && len(one) > 0 && len(one[0].Matches) > len(printed[i].Matches) {
					return true, nil
				}
			}
		}
	}
	return false, nil
}

// savedRules returns the rules of a chain as iptables-save printed them, or nil if it
// did not print as many as the kernel has.
func savedRules(t exposure.Table, c *liveChain) []exposure.Rule {
	for _, s := range t.Chains {
		if s.Name == c.Name && len(s.Rules) == len(c.rules) {
			return s.Rules
		}
	}
	return nil
}

// liveTables returns the tables of the socket's family that are not dormant, without the
// chains for packets that leave.
func liveTables(s *socket) (out []*liveTable, err error) {
	dump := func(kind uint16, of []byte, each func([]byte) error) {
		if err == nil {
			err = s.ask(kind, unix.NLM_F_DUMP, of, each)
		}
	}
	dump(unix.NFT_MSG_GETTABLE, nil, func(b []byte) error {
		a, err := attributesOf(b)
		if number(a[unix.NFTA_TABLE_FLAGS])&unix.NFT_TABLE_F_DORMANT == 0 {
			out = append(out, &liveTable{name: text(a[unix.NFTA_TABLE_NAME])})
		}
		return err
	})
	if len(out) == 0 {
		return nil, err
	}
	type name struct{ table, chain string }
	chains := map[name]*liveChain{}
	dump(unix.NFT_MSG_GETCHAIN, nil, func(b []byte) error {
		c, of, err := readLiveChain(b, s.family)
		i := slices.IndexFunc(out, func(t *liveTable) bool { return t.name == of })
		if i >= 0 && (!c.base || c.Hook != "") {
			out[i].chains = append(out[i].chains, c)
			chains[name{of, c.Name}] = c
		}
		return err
	})
	dump(unix.NFT_MSG_GETRULE, nil, func(b []byte) error {
		r, of, err := readRule(bytes.Clone(b))
		if c := chains[name{of, r.chain}]; c != nil {
			c.rules = append(c.rules, r)
		}
		return err
	})
	return out, err
}

// liveHooks are the hooks by number, in the family netdev and in others.
var liveHooks = map[bool]map[uint64]exposure.Hook{
	true:  {0: exposure.Ingress},
	false: {0: exposure.Prerouting, 1: exposure.Input, 2: exposure.Forward, 5: exposure.Ingress},
}

func readLiveChain(b []byte, family byte) (*liveChain, string, error) {
	a, err := attributesOf(b)
	if err != nil {
		return &liveChain{}, "", err
	}
	c := &liveChain{Chain: exposure.Chain{Name: text(a[unix.NFTA_CHAIN_NAME])}}
	if h := a[unix.NFTA_CHAIN_HOOK]; h != nil {
		var hook attributes
		hook, err = attributesOf(h)
		c.base = true
		c.Hook = liveHooks[family == unix.NFPROTO_NETDEV][number(hook[unix.NFTA_HOOK_HOOKNUM])]
		c.Priority = int(int32(number(hook[unix.NFTA_HOOK_PRIORITY])))
		c.NAT = text(a[unix.NFTA_CHAIN_TYPE]) == "nat"
		c.Drop = a[unix.NFTA_CHAIN_POLICY] != nil && number(a[unix.NFTA_CHAIN_POLICY]) == nfDrop
		if dev := hook[unix.NFTA_HOOK_DEV]; dev != nil {
			c.Devices = append(c.Devices, text(dev))
		}
		const hookDevices = 4 // NFTA_HOOK_DEVS
		_ = each(hook[hookDevices], func(a attribute) {
			if dev := text(a.data); !slices.Contains(c.Devices, dev) {
				c.Devices = append(c.Devices, dev)
			}
		})
	}
	return c, text(a[unix.NFTA_CHAIN_TABLE]), err
}

// attributes are the attributes in a list by their kind, for the lowest kinds.
type attributes [16][]byte

func attributesOf(b []byte) (out attributes, err error) {
	var room [few]attribute
	list, err := appendAttributes(room[:0], b)
	for _, a := range list {
		if int(a.kind) < len(out) {
			out[a.kind] = a.data
		}
	}
	return out, err
}

// setsConnectionMark reports whether a rule sets connections' marks.
func setsConnectionMark(r rule) bool {
	return slices.ContainsFunc(r.exprs, func(e expression) bool {
		a, _ := attributesOf(e.data)
		return e.name == "ct" && a[unix.NFTA_CT_SREG] != nil && number(a[unix.NFTA_CT_KEY]) == unix.NFT_CT_MARK ||
			e.name == "target" && text(a[unix.NFTA_TARGET_NAME]) == "CONNMARK"
	})
}

// links are the network interfaces, read on first use.
type links struct {
	list []link
	read bool
	err  error
}

type link struct {
	name  string
	index uint32
	kind  uint32 // ARPHRD_*
}

// values returns the names of interfaces, each with a number of the interface.
func (l *links) values(of func(link) uint32) ([]named, error) {
	if !l.read {
		l.read = true
		l.list, l.err = readLinks()
	}
	var out []named
	for _, i := range l.list {
		out = append(out, named{of(i), i.name})
	}
	slices.SortFunc(out, func(a, b named) int { return cmp.Compare(a.name, b.name) })
	return out, l.err
}

func readLinks() (out []link, err error) {
	b, err := syscall.NetlinkRIB(unix.RTM_GETLINK, unix.AF_UNSPEC)
	if err != nil {
		return nil, fmt.Errorf("listing interfaces: %w", err)
	}
	messages, err := syscall.ParseNetlinkMessage(b)
	for _, m := range messages {
		if m.Header.Type != unix.RTM_NEWLINK || len(m.Data) < unix.SizeofIfInfomsg {
			continue
		}
		i := link{kind: uint32(binary.NativeEndian.Uint16(m.Data[2:])), index: binary.NativeEndian.Uint32(m.Data[4:])}
		_ = each(m.Data[unix.SizeofIfInfomsg:], func(a attribute) {
			if a.kind == unix.IFLA_IFNAME {
				i.name = text(a.data)
			}
		})
		out = append(out, i)
	}
	return out, err
}
