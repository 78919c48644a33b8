package nftables

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/basicfw/basicfw-agent/agent/exposure"
)

// Ipsets are read here because the library vishvananda/netlink drops the flag of an element
// that is an exception. It also writes whatever else it does not know to standard error.

// The parts of ipset's protocol that are read here (linux/netfilter/ipset/ip_set.h).
const (
	ipsetProtocol = 6
	ipsetList     = 7 // IPSET_CMD_LIST

	// Of a command.
	ipsetAttrProtocol, ipsetAttrName, ipsetAttrType, ipsetAttrFamily, ipsetAttrData, ipsetAttrElements = 1, 2, 3, 5, 7, 8
	// Of a set.
	ipsetAttrBitmask, ipsetAttrNetmask, ipsetAttrSize = 12, 20, 24
	// Of an element.
	ipsetAttrIP, ipsetAttrBits, ipsetAttrPort, ipsetAttrProto, ipsetAttrFlags        = 1, 3, 4, 7, 8
	ipsetAttrMember, ipsetAttrSecond, ipsetAttrSecondBits, ipsetAttrInterface        = 18, 20, 21, 23
	ipsetFlagPhysical, ipsetFlagNoMatch, ipsetFlagWildcard                    uint64 = 1 << 1, 1 << 2, 1 << 7
)

// ipset returns a set of ipset with its elements.
func ipset(s *socket, name string) (out exposure.IPSet, err error) {
	r := ipsetReader{netmask: -1}
	query := putString(put(nil, ipsetAttrProtocol, []byte{ipsetProtocol}), ipsetAttrName, name)
	err = s.askOf(unix.NFNL_SUBSYS_IPSET, ipsetList, unix.NLM_F_DUMP, query, func(b []byte) error {
		return errors.Join(each(b, r.command), r.err)
	})
	if err == nil && r.set.Type == "" {
		err = unix.ENOENT
	}
	if err != nil {
		return out, fmt.Errorf("reading the ipset %.40q: %w", name, err)
	}
	return r.set, nil
}

// ipsetReader reads the messages about one set. A large set needs several.
type ipsetReader struct {
	set     exposure.IPSet
	netmask int // of the addresses of the set; -1 is all bits
	err     error
}

func (r *ipsetReader) command(a attribute) {
	switch a.kind {
	case ipsetAttrType:
		r.set.Type = text(a.data)
	case ipsetAttrFamily:
		if len(a.data) == 1 {
			r.set.Family = map[byte]string{unix.NFPROTO_IPV4: "ip", unix.NFPROTO_IPV6: "ip6"}[a.data[0]]
		}
	case ipsetAttrData:
		r.fail(each(a.data, func(a attribute) {
			switch {
			case a.kind == ipsetAttrBitmask:
				r.err = errors.New("a set with a bitmask is not modelled")
			case a.kind == ipsetAttrSize:
				r.set.Size = int(number(a.data))
			case a.kind == ipsetAttrNetmask && len(a.data) == 1:
				r.netmask = int(a.data[0])
			}
		}))
	case ipsetAttrElements:
		r.fail(each(a.data, func(a attribute) { r.element(a.data) }))
	}
}

func (r *ipsetReader) fail(err error) {
	if r.err == nil {
		r.err = err
	}
}

func (r *ipsetReader) element(b []byte) {
	var e exposure.IPSetElement
	var first, second netip.Addr
	bits, secondBits, wildcard := r.netmask, -1, ""
	r.fail(each(b, func(a attribute) {
		small := 0
		if len(a.data) == 1 {
			small = int(a.data[0])
		}
		switch a.kind {
		case ipsetAttrIP:
			first = r.address(a.data)
		case ipsetAttrSecond:
			second = r.address(a.data)
		case ipsetAttrBits:
			bits = small
		case ipsetAttrSecondBits:
			secondBits = small
		case ipsetAttrPort:
			if len(a.data) == 2 {
				e.Port = binary.BigEndian.Uint16(a.data)
			}
		case ipsetAttrProto:
			e.Proto = uint8(small)
		case ipsetAttrInterface:
			e.Interface = text(a.data)
		case ipsetAttrMember:
			r.set.Members = append(r.set.Members, text(a.data))
		case ipsetAttrFlags:
			flags := number(a.data)
			e.NoMatch = flags&ipsetFlagNoMatch != 0
			if flags&ipsetFlagWildcard != 0 {
				wildcard = "*"
			}
			if flags&ipsetFlagPhysical != 0 {
				r.fail(errors.New("the port of a bridge is not modelled"))
			}
		}
	}))
	e.Interface += wildcard
	prefix := func(a netip.Addr, bits int) netip.Prefix {
		if bits < 0 || bits > a.BitLen() {
			bits = a.BitLen()
		}
		return netip.PrefixFrom(a, bits)
	}
	if first.IsValid() {
		e.Net = prefix(first, bits)
	}
	if second.IsValid() {
		e.Second = prefix(second, secondBits)
	}
	r.set.Add(e)
}

// address returns an address, which is in an attribute of its own.
func (r *ipsetReader) address(b []byte) (out netip.Addr) {
	r.fail(each(b, func(a attribute) { out, _ = netip.AddrFromSlice(a.data) }))
	return out
}

// ipsets returns a function that reads a set. It opens a socket when it is called.
func ipsets() func(name string) (exposure.IPSet, error) {
	return func(name string) (exposure.IPSet, error) {
		s, err := dial()
		if err != nil {
			return exposure.IPSet{}, err
		}
		defer s.close()
		return ipset(s, name)
	}
}
