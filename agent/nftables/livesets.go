package nftables

import (
	"bytes"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/basicfw/basicfw-agent/agent/exposure"
)

// liveSets reads the sets and maps of a table on first use.
type liveSets struct {
	socket *socket
	table  string
	sets   map[string]*liveSet
}

// elements are the elements of a set or map.
type elements []element

// element is an inclusive range of keys, and the data of a map for it.
type element struct{ first, last, data []byte }

// liveSet is a set or map with its elements as ranges of keys.
type liveSet struct {
	set
	list     elements
	catchall []byte                    // the data of the element for all other keys; nil if there is none
	matches  map[string]exposure.Match // by the fields of the key
}

func (l *liveSets) get(name string) (*liveSet, error) {
	if s, ok := l.sets[name]; ok {
		return s, nil
	}
	out := &liveSet{matches: map[string]exposure.Match{}}
	of := putString(putString(nil, unix.NFTA_SET_TABLE, l.table), unix.NFTA_SET_NAME, name)
	err := l.socket.ask(unix.NFT_MSG_GETSET, 0, of, func(b []byte) (err error) {
		out.set, err = readSet(b)
		return err
	})
	if err == nil && !out.isDynamic() {
		err = l.read(out)
	}
	if l.sets == nil {
		l.sets = map[string]*liveSet{}
	}
	l.sets[name] = out
	return out, err
}

// intervalEnd is the last key of an element that is only the end of the one before.
var intervalEnd = []byte{}

func isEnd(e element) bool { return e.last != nil && len(e.last) == 0 }

func (l *liveSets) read(s *liveSet) error {
	of := putString(putString(nil, unix.NFTA_SET_ELEM_LIST_TABLE, l.table), unix.NFTA_SET_ELEM_LIST_SET, s.name)
	var list elements
	size := int(s.keyLen)
	err := l.socket.ask(unix.NFT_MSG_GETSETELEM, unix.NLM_F_DUMP, of, func(b []byte) error {
		a, err := attributesOf(bytes.Clone(b)) // the elements refer to it
		if err != nil {
			return err
		}
		return each(a[unix.NFTA_SET_ELEM_LIST_ELEMENTS], func(a attribute) {
			switch e, all := readLiveElement(a.data); {
			case all:
				s.catchall = append([]byte{}, e.data...)
			case len(e.first) >= size && (e.last == nil || isEnd(e) || len(e.last) >= size):
				list = append(list, e)
			}
		})
	})
	if err != nil {
		return err
	}
	slices.SortFunc(list, func(a, b element) int {
		if c := bytes.Compare(a.first, b.first); c != 0 || isEnd(a) == isEnd(b) {
			return c
		}
		if isEnd(a) { // adjacent intervals: one ends before the next begins
			return -1
		}
		return 1
	})
	// In a set of one field, an interval is two elements, the second with the first key
	// after it. If an interval reaches the last key, it has no end.
	pairs := s.flags&unix.NFT_SET_INTERVAL != 0 && !slices.ContainsFunc(list, func(e element) bool { return len(e.last) > 0 })
	s.list = list[:0]
	for i, e := range list {
		switch {
		case isEnd(e):
			continue
		case pairs && i+1 < len(list):
			e.last, _ = less(list[i+1].first)
		case pairs:
			e.last = bytes.Repeat([]byte{0xff}, len(e.first))
		case e.last == nil:
			e.last = e.first
		}
		s.list = append(s.list, e)
	}
	return nil
}

// readLiveElement decodes an element. If all is true, the element is for all other keys.
func readLiveElement(b []byte) (e element, all bool) {
	const keyEnd = 10  // NFTA_SET_ELEM_KEY_END, since Linux 5.6
	const catchall = 2 // NFT_SET_ELEM_CATCHALL, since Linux 5.13
	value := func(b []byte) []byte {
		a, _ := attributesOf(b) // without a value, the element is left out
		return a[unix.NFTA_DATA_VALUE]
	}
	a, _ := attributesOf(b)
	e.first, e.data = value(a[unix.NFTA_SET_ELEM_KEY]), a[unix.NFTA_SET_ELEM_DATA]
	if k := a[keyEnd]; k != nil {
		e.last = value(k)
	}
	flags := number(a[unix.NFTA_SET_ELEM_FLAGS])
	if flags&unix.NFT_SET_ELEM_INTERVAL_END != 0 {
		e.last = intervalEnd
	}
	return e, flags&catchall != 0
}

// less returns a number minus one, or false for 0.
func less(b []byte) ([]byte, bool) {
	b = slices.Clone(b)
	for j := len(b) - 1; j >= 0; j-- {
		b[j]--
		if b[j] != 0xff {
			return b, true
		}
	}
	return b, false
}

// more returns a number plus one, or false for the highest one.
func more(b []byte) ([]byte, bool) {
	b = slices.Clone(b)
	for j := len(b) - 1; j >= 0; j-- {
		b[j]++
		if b[j] != 0 {
			return b, true
		}
	}
	return b, false
}

// groups returns the elements of a map by their data, in the order of the keys.
func groups(list elements) []elements {
	var out []elements
	at := map[string]int{}
	for _, e := range list {
		i, ok := at[string(e.data)]
		if !ok {
			i = len(out)
			at[string(e.data)] = i
			out = append(out, nil)
		}
		out[i] = append(out[i], e)
	}
	return out
}
