package netsim

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"net/netip"
	"slices"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// ICMP types with special treatment.
const (
	echoReply, echoRequest   = 0, 8
	echoRequest6, echoReply6 = 128, 129
	neighbourDiscovery       = 133 // to 136
)

// errors4 and errors6 are the ICMP types whose body is the packet in question.
var errors4, errors6 = []uint8{3, 4, 5, 11, 12}, []uint8{1, 2, 3, 4}

// Unprovoked returns the conntrack state of a packet that belongs to no connection
// (nf_conntrack_proto_tcp.c with the default of nf_conntrack_tcp_loose,
// nf_conntrack_proto_icmp.c, nf_conntrack_proto_icmpv6.c).
func Unprovoked(p firewall.Packet) firewall.Tracked {
	isNew := true
	switch p.Proto {
	case firewall.TCP: // accepted by tcp_valid_flags, without FIN and RST
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
	if isNew {
		return firewall.TrackedNew
	}
	return firewall.TrackedInvalid
}

// The range of source ports if a packet has none.
const firstPort, ports = 20000, 40000

// wire is the encoding of one packet of a test.
type wire struct {
	before []byte // sent first by the copy; nil if there is none
	packet []byte // sent by the peer
}

// encode encodes an IP packet that ends in tag, and the packet that must precede it so
// that conntrack assigns p.State. The number n is unique.
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
		return w, fmt.Errorf("%s packet cannot have conntrack state %s: without a connection it is %s", p.Proto, p.State, natural)
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

// about returns the packet that an ICMP error is about: the first of a connection from
// this host.
func about(p firewall.Packet, n int) firewall.Packet {
	return firewall.Packet{Src: p.Dst, Dst: p.Src, Proto: firewall.TCP, SrcPort: uint16(firstPort + n%ports), DstPort: 443,
		Flags: uint8(firewall.SYN), HopLimit: 64}
}

func number(p firewall.Proto) (uint8, error) {
	n := p.Number()
	if n == 0 {
		return 0, fmt.Errorf("unknown protocol %q", string(p))
	}
	return n, nil
}

// The initial sequence numbers of this host and of the peer.
const ourSequence, theirSequence = 1_000_000, 2_000_000

// encodeIP returns a packet with its headers. inner is the packet in question of an ICMP
// error; broken causes a wrong checksum.
func encodeIP(p firewall.Packet, inner []byte, n int, tag []byte, broken bool) []byte {
	proto, _ := number(p.Proto)
	body := make([]byte, 8)
	checksum := -1 // its offset
	switch p.Proto {
	case firewall.SCTP:
		body, tag = encodeSCTP(p, tag, broken), nil
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
		binary.BigEndian.PutUint16(body[0:], p.SrcPort)
		binary.BigEndian.PutUint16(body[2:], p.DstPort)
		binary.BigEndian.PutUint16(body[4:], uint16(len(body)+len(tag)))
		checksum = 6
	case firewall.ICMP, firewall.ICMPv6:
		body[0] = p.ICMPType
		switch {
		case p.Proto == firewall.ICMP && p.ICMPType == 3:
			body[1] = 4 // too big
			binary.BigEndian.PutUint16(body[6:], 1400)
		case p.Proto == firewall.ICMPv6 && p.ICMPType == 2:
			binary.BigEndian.PutUint32(body[4:], 1400)
		case !isError(p):
			binary.BigEndian.PutUint16(body[4:], uint16(n)) // identifier of an echo
		}
		body = append(body, inner...)
		if p.Proto == firewall.ICMPv6 && !isError(p) {
			// A target, and an option of length 0, so that the kernel discards
			// messages about neighbours and routers (RFC 4861, 4.6).
			body = append(body, make([]byte, 16+8)...)
		}
		checksum = 2
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
		if sum == 0 && p.Proto == firewall.UDP { // 0 means no checksum (RFC 768)
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

// encodeSCTP returns the first packet of an SCTP association (RFC 9260, 3.1 and 3.3.2).
func encodeSCTP(p firewall.Packet, tag []byte, broken bool) []byte {
	body := make([]byte, 12+20)
	binary.BigEndian.PutUint16(body[0:], p.SrcPort)
	binary.BigEndian.PutUint16(body[2:], p.DstPort)
	body[12] = 1 // INIT
	binary.BigEndian.PutUint16(body[14:], uint16(20+len(tag)))
	body[19], body[25], body[27], body[31] = 1, 1, 1, 1 // tag, streams, sequence number
	body = append(body, tag...)
	sum := crc32.Checksum(body, crc32.MakeTable(crc32.Castagnoli))
	if broken {
		sum ^= 0x5555
	}
	binary.LittleEndian.PutUint32(body[8:], sum)
	return body
}

// sum16 returns the Internet checksum (RFC 1071) of parts, of which only the last may
// have an odd length.
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

// hardware returns the destination MAC address for a packet.
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

// LinkLocal is an address of every interface of a copy.
var LinkLocal = netip.MustParseAddr("fe80::b:f1")
