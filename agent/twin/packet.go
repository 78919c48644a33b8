package twin

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strconv"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// ICMP types that something here depends on.
const (
	echoReply, echoRequest   = 0, 8
	echoRequest6, echoReply6 = 128, 129
	neighbourDiscovery       = 133 // to 136
)

// errors are the types of ICMP whose body is the packet that they are about.
var errors4, errors6 = []uint8{3, 4, 5, 11, 12}, []uint8{1, 2, 3, 4}

// Unprovoked says what conntrack makes of a packet that belongs to nothing: the
// flags' table and the first line of the states' of nf_conntrack_proto_tcp.c,
// with nf_conntrack_tcp_loose as it is by default, nf_conntrack_proto_icmp.c
// and nf_conntrack_proto_icmpv6.c.
func Unprovoked(p firewall.Packet) firewall.Tracked {
	isNew := true
	switch p.Proto {
	case firewall.TCP:
		f := firewall.TCPFlags(p.Flags) & (firewall.FIN | firewall.SYN | firewall.RST | firewall.ACK)
		isNew = f == firewall.SYN || f == firewall.ACK
	case firewall.ICMP:
		isNew = slices.Contains([]uint8{echoRequest, 13, 15, 17}, p.ICMPType)
	case firewall.ICMPv6:
		if p.ICMPType >= 130 && p.ICMPType <= 136 || p.ICMPType == 143 {
			return firewall.Untracked
		}
		isNew = p.ICMPType == echoRequest6 || p.ICMPType == 139
	}
	if isNew && flagsFit(p) {
		return firewall.TrackedNew
	}
	return firewall.TrackedInvalid
}

// flagsFit is tcp_valid_flags of nf_conntrack_proto_tcp.c, of what has SYN or
// ACK and neither FIN nor RST.
func flagsFit(p firewall.Packet) bool {
	return p.Proto != firewall.TCP || firewall.TCPFlags(p.Flags)&(firewall.FIN|firewall.RST) == 0
}

// ports of what is asked for by us, where a packet says none.
const firstPort, ports = 20000, 40000

// wire is what one packet of a test is on the wire.
type wire struct {
	before []byte // goes out from the twin first; nil is nothing
	packet []byte // comes in
}

// encode makes an IP packet that ends in tag, and what has to go before it so
// that conntrack takes it for what it is said to be. n tells one from all
// others: where the packet says no port, it is of one that no other packet has.
func encode(p firewall.Packet, n int, tag []byte) (wire, error) {
	if p.SrcPort == 0 {
		p.SrcPort = uint16(firstPort + n%ports)
	}
	back := p // the other direction
	back.Src, back.Dst, back.SrcPort, back.DstPort, back.HopLimit = p.Dst, p.Src, p.DstPort, p.SrcPort, 64
	natural := Unprovoked(p)
	var w wire
	broken := false
	switch {
	case p.State == natural:
	case p.State == firewall.TrackedInvalid && natural != firewall.Untracked:
		broken = true
	case p.State == firewall.TrackedRelated && isError(p):
		w.before = encodeIP(about(p, n), nil, 0, nil, false)
	case p.State == firewall.TrackedEstablished:
		switch p.Proto {
		case firewall.TCP:
			back.Flags = uint8(firewall.SYN)
		case firewall.ICMP:
			back.ICMPType = echoRequest
		case firewall.ICMPv6:
			back.ICMPType = echoRequest6
		}
		w.before = encodeIP(back, nil, n, nil, false)
	default:
		return w, fmt.Errorf("no packet of %s can be %s to conntrack where one like it is %s", p.Proto, p.State, natural)
	}
	var inner []byte
	if isError(p) {
		inner = encodeIP(about(p, n), nil, 0, nil, false)
	}
	w.packet = encodeIP(p, inner, n, tag, broken)
	return w, nil
}

func isError(p firewall.Packet) bool {
	return p.Proto == firewall.ICMP && slices.Contains(errors4, p.ICMPType) ||
		p.Proto == firewall.ICMPv6 && slices.Contains(errors6, p.ICMPType)
}

// about is the packet of ours that an ICMP error is about: it began a
// connection.
func about(p firewall.Packet, n int) firewall.Packet {
	return firewall.Packet{Src: p.Dst, Dst: p.Src, Proto: firewall.TCP, SrcPort: uint16(firstPort + n%ports), DstPort: 443,
		Flags: uint8(firewall.SYN), HopLimit: 64}
}

func number(p firewall.Proto) (uint8, error) {
	switch p {
	case firewall.ICMP:
		return 1, nil
	case firewall.TCP:
		return 6, nil
	case firewall.UDP:
		return 17, nil
	case firewall.ICMPv6:
		return 58, nil
	}
	n, err := strconv.ParseUint(string(p), 10, 8)
	return uint8(n), err
}

// Where sequence numbers begin: ours, and those of who answers.
const ourSequence, theirSequence = 1_000_000, 2_000_000

// encodeIP is a packet with its headers. Of an ICMP error, inner is what it is
// about; broken has a wrong checksum.
func encodeIP(p firewall.Packet, inner []byte, n int, tag []byte, broken bool) []byte {
	proto, _ := number(p.Proto)
	var body []byte
	checksum := -1 // where it is
	switch p.Proto {
	case firewall.TCP:
		body = make([]byte, 20)
		binary.BigEndian.PutUint16(body[0:], p.SrcPort)
		binary.BigEndian.PutUint16(body[2:], p.DstPort)
		binary.BigEndian.PutUint32(body[4:], ourSequence)
		if tag != nil {
			binary.BigEndian.PutUint32(body[4:], theirSequence)
		}
		if firewall.TCPFlags(p.Flags)&firewall.ACK != 0 {
			binary.BigEndian.PutUint32(body[8:], ourSequence+1)
		}
		body[12], body[13] = 5<<4, p.Flags
		binary.BigEndian.PutUint16(body[14:], 65535) // window
		checksum = 16
	case firewall.UDP:
		body = make([]byte, 8)
		binary.BigEndian.PutUint16(body[0:], p.SrcPort)
		binary.BigEndian.PutUint16(body[2:], p.DstPort)
		binary.BigEndian.PutUint16(body[4:], uint16(len(body)+len(tag)))
		checksum = 6
	case firewall.ICMP, firewall.ICMPv6:
		body = make([]byte, 8)
		body[0] = p.ICMPType
		switch {
		case p.Proto == firewall.ICMP && p.ICMPType == 3:
			body[1] = 4 // too big
			binary.BigEndian.PutUint16(body[6:], 1400)
		case p.Proto == firewall.ICMPv6 && p.ICMPType == 2:
			binary.BigEndian.PutUint32(body[4:], 1400)
		case !isError(p):
			binary.BigEndian.PutUint16(body[4:], uint16(n)) // of an echo: whose it is
		}
		body = append(body, inner...)
		if p.Proto == firewall.ICMPv6 && !isError(p) {
			// A target, and an option of no length, so that no kernel believes
			// what it says of neighbours and routers (RFC 4861, 4.6).
			body = append(body, make([]byte, 16+8)...)
		}
		checksum = 2
	default:
		body = make([]byte, 8)
	}
	body = append(body, tag...)
	if checksum >= 0 {
		sum := sum16(body)
		if p.Proto != firewall.ICMP {
			sum = sum16(p.Src.AsSlice(), p.Dst.AsSlice(), []byte{0, proto, byte(len(body) >> 8), byte(len(body))}, body)
		}
		if broken {
			sum ^= 0x5555
		}
		if sum == 0 && p.Proto == firewall.UDP { // which says that there is none (RFC 768)
			sum = 0xffff
		}
		binary.BigEndian.PutUint16(body[checksum:], sum)
	}
	if p.Src.Is4() {
		head := make([]byte, 20)
		head[0] = 4<<4 | 5
		binary.BigEndian.PutUint16(head[2:], uint16(len(head)+len(body)))
		head[8], head[9] = p.HopLimit, proto
		copy(head[12:], p.Src.AsSlice())
		copy(head[16:], p.Dst.AsSlice())
		binary.BigEndian.PutUint16(head[10:], sum16(head))
		return append(head, body...)
	}
	head := make([]byte, 40)
	head[0] = 6 << 4
	binary.BigEndian.PutUint16(head[4:], uint16(len(body)))
	head[6], head[7] = proto, p.HopLimit
	copy(head[8:], p.Src.AsSlice())
	copy(head[24:], p.Dst.AsSlice())
	return append(head, body...)
}

// sum16 is the Internet's checksum (RFC 1071) of parts, of which only the last
// may have an odd length.
func sum16(parts ...[]byte) uint16 {
	var sum uint32
	for _, b := range parts {
		for i := 0; i < len(b); i += 2 {
			word := uint32(b[i]) << 8
			if i+1 < len(b) {
				word |= uint32(b[i+1])
			}
			sum += word
		}
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

// hardware is the address that an Ethernet frame with a packet goes to.
func hardware(p firewall.Packet, host []byte) []byte {
	switch {
	case p.DstType == firewall.Broadcast:
		return []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	case p.Dst.Is4() && p.Dst.IsMulticast(): // RFC 1112, 6.4
		a := p.Dst.As4()
		return []byte{0x01, 0x00, 0x5e, a[1] & 0x7f, a[2], a[3]}
	case p.Dst.IsMulticast(): // RFC 2464, 7
		a := p.Dst.As16()
		return []byte{0x33, 0x33, a[12], a[13], a[14], a[15]}
	}
	return host
}

// LinkLocal is the address that every interface of a twin has.
var LinkLocal = netip.MustParseAddr("fe80::b:f1")
