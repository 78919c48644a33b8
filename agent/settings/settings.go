package settings

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/system"
)

// DefaultFile is the owner's settings. What commands write lies beside it, in
// LocalName, and wins.
const (
	DefaultFile = "/etc/basicfw/agent.ini"
	LocalName   = "local.ini"
)

// Auto is the value of what the agent finds out by itself.
const Auto = "auto"

// AllowMode is how it is said who may log in over SSH.
type AllowMode string

// The modes. AllowClient is the provisioning client, named or detected, and
// AllowList nobody but those who are listed.
const (
	AllowClient AllowMode = "client"
	AllowAny    AllowMode = "any"
	AllowNone   AllowMode = "none"
	AllowList   AllowMode = "list"
)

// Allow is who may log in over SSH: those of the mode, and those that are
// listed besides.
type Allow struct {
	Mode AllowMode
	List []netip.Prefix // not empty where Mode is AllowList, nil where it is AllowNone
	// Timed may log in until a time. Mode is another than AllowList if there is
	// nobody else.
	Timed []firewall.TimedSource
}

// String gives the value as the settings write it.
func (a Allow) String() string {
	var words []string
	if a.Mode != AllowList {
		words = append(words, string(a.Mode))
	}
	words = append(words, firewall.FormatPrefixes(a.List)...)
	for _, t := range a.Timed {
		words = append(words, firewall.FormatPrefix(t.From)+" "+until+" "+firewall.FormatTime(t.Until))
	}
	return strings.Join(words, ", ")
}

// until stands between an address and the time until which it may log in.
const until = "until"

// Closed is the value of a service in [open] that is not to be reached, though
// the profile or the owner's own settings open it.
const Closed = "closed"

// What to do about other programs that manage the firewall.
const (
	TakeOver = "takeover"
	Refuse   = "refuse"
)

// Settings is what the owner wants. Whatever was not said has its default. A
// copy shares Open and Sources with the original.
type Settings struct {
	Profile    string // Auto, or a profile's name, which need not exist
	Backend    string // Auto, "iptables" or "nftables"
	OnConflict string // TakeOver or Refuse

	SSHPorts     []uint16 // nil is auto
	Allow        Allow
	ClientIP     []netip.Prefix // the named provisioning clients; nil is none named
	ClientIPText string         // as the user wrote them
	// Limit is for new SSH connections from one source; zero is none.
	Limit firewall.Rate
	// ConfirmWithin is how long a detected client has to confirm; 0 is for ever.
	ConfirmWithin time.Duration

	Public  []string // interfaces, with a last "*" for any rest; nil is auto
	Private []string // as Public
	Trusted []string // nil is none

	Open   []firewall.Service // besides the profile's; Source says where each was asked for
	Closed []string           // names of services that stay closed
	// Replaced are services of the owner's file that local.ini says anew.
	Replaced []firewall.Service

	LogLevel string // a level of logrus
	LogDrops bool

	// Sources says where a setting came from, by its section.key:
	// "/etc/basicfw/local.ini:7", "--client-ip". A default has none.
	Sources map[string]string
}

// Defaults is the settings of somebody who has said nothing.
func Defaults() Settings {
	return Settings{
		Profile:       Auto,
		Backend:       Auto,
		OnConflict:    TakeOver,
		Allow:         Allow{Mode: AllowClient},
		Limit:         firewall.Rate{N: 30, Per: firewall.Minute},
		ConfirmWithin: 30 * time.Minute,
		LogLevel:      "info",
		LogDrops:      true,
		Sources:       map[string]string{},
	}
}

// Load reads the settings: config, and then local.ini beside it, which wins key
// by key. An empty config is DefaultFile, and that need not be there; one that
// was named must. The error is Errors with everything that is wrong in both;
// the settings beside it hold everything that was right.
func Load(sys *system.System, config string) (Settings, error) {
	var local func(file string) (*Document, Errors)
	if sys.Exists(LocalFile(config)) {
		local = func(file string) (*Document, Errors) { return Read(sys, file) }
	}
	return load(sys, config, local)
}

// LoadEdited is Load with a text in the place of what is in local.ini.
func LoadEdited(sys *system.System, config string, text []byte) (Settings, error) {
	return load(sys, config, func(file string) (*Document, Errors) { return Parse(file, text) })
}

// LocalFile is where commands keep settings: beside the owner's.
func LocalFile(config string) string {
	return filepath.Join(filepath.Dir(cmp.Or(config, DefaultFile)), LocalName)
}

func load(sys *system.System, config string, local func(file string) (*Document, Errors)) (Settings, error) {
	s := Defaults()
	var errs Errors
	if file := cmp.Or(config, DefaultFile); config != "" || sys.Exists(file) {
		doc, problems := Read(sys, file)
		errs = append(errs, s.decode(doc, problems)...)
	}
	if local != nil {
		doc, problems := local(LocalFile(config))
		errs = append(errs, s.decode(doc, problems)...)
	}
	if p, clash := s.zoneClash(); clash {
		errs = append(errs, p)
	}
	return s, errs.Err()
}

// decode puts a document's values over s, and adds what is wrong with them to
// the document's own problems.
func (s *Settings) decode(doc *Document, problems Errors) Errors {
	for _, section := range doc.Sections {
		known := keysOf(section.Name)
		if known == nil {
			problems = append(problems, Problem{File: doc.File, Line: section.Line,
				Msg: fmt.Sprintf("unknown section [%s]: there are %s", section.Name, sectionNames())})
			continue
		}
		for _, k := range section.Keys {
			err := s.set(section.Name, k.Name, k.Value, fmt.Sprintf("%s:%d", doc.File, k.Line))
			problems.Add(doc.File, k.Line, section.Name+"."+k.Name, err)
		}
	}
	problems.Sort()
	return problems
}

// Set gives one setting a value, which may be text of a user's: a flag's, say,
// with source "--client-ip". An empty value is as good as none, and changes
// nothing. The error is Errors, and then nothing has changed either.
func (s *Settings) Set(section, key, value, source string) error {
	var errs Errors
	errs.Add(source, 0, section+"."+key, s.set(section, key, value, source))
	return errs.Err()
}

// layout is the sections, in the order of the manual, and their keys.
// [open] has names of services for keys.
func layout() []struct {
	name string
	keys []string
} {
	return []struct {
		name string
		keys []string
	}{
		{"agent", []string{"profile", "backend", "on_conflict"}},
		{"ssh", []string{"ports", "allow", "client_ip", "limit", "confirm_within"}},
		{"interfaces", []string{"public", "private", "trusted"}},
		{"open", []string{}},
		{"log", []string{"level", "drops"}},
	}
}

func keysOf(section string) []string {
	for _, l := range layout() {
		if l.name == section {
			return l.keys
		}
	}
	return nil
}

func sectionNames() string {
	var names []string
	for _, l := range layout() {
		names = append(names, "["+l.name+"]")
	}
	return strings.Join(names, ", ")
}

// unknownKey says which keys the section has, or which section has the key.
func unknownKey(section, key string) error {
	for _, l := range layout() {
		if slices.Contains(l.keys, key) {
			return fmt.Errorf("it belongs into the section [%s]", l.name)
		}
	}
	return fmt.Errorf("unknown key: [%s] has %s", section, strings.Join(keysOf(section), ", "))
}

// set is the one place where a value is judged.
func (s *Settings) set(section, key, value, source string) error {
	value = strings.TrimSpace(value)
	if section == "open" {
		return s.setOpen(key, value, source)
	}
	if keysOf(section) == nil {
		return fmt.Errorf("unknown section: there are %s", sectionNames())
	}
	if !slices.Contains(keysOf(section), key) {
		return unknownKey(section, key)
	}
	if value == "" {
		return nil
	}
	var err error
	switch section + "." + key {
	case "agent.profile":
		err = into(&s.Profile)(parseProfile(value))
	case "agent.backend":
		err = into(&s.Backend)(oneOf(value, Auto, "iptables", "nftables"))
	case "agent.on_conflict":
		err = into(&s.OnConflict)(oneOf(value, TakeOver, Refuse))
	case "ssh.ports":
		err = into(&s.SSHPorts)(parsePortList(value))
	case "ssh.allow":
		err = into(&s.Allow)(parseAllow(value))
	case "ssh.client_ip":
		sources, errs := firewall.ParseSources(value)
		if err = errors.Join(errs...); err == nil {
			s.ClientIP, s.ClientIPText = sources, strings.Join(strings.Fields(value), " ")
		}
	case "ssh.limit":
		err = into(&s.Limit)(parseRate(value))
	case "ssh.confirm_within":
		err = into(&s.ConfirmWithin)(parseDuration(value))
	case "interfaces.public":
		err = into(&s.Public)(parseInterfaces(value, true))
	case "interfaces.private":
		err = into(&s.Private)(parseInterfaces(value, true))
	case "interfaces.trusted":
		err = into(&s.Trusted)(parseInterfaces(value, false))
	case "log.level":
		err = into(&s.LogLevel)(oneOf(value, "error", "warn", "warning", "info", "debug", "trace"))
	case "log.drops":
		err = into(&s.LogDrops)(ParseYesNo(value))
	}
	if err != nil {
		return err
	}
	s.setSource(section, key, source)
	return nil
}

// into gives what puts a value into a field, unless there is an error.
func into[T any](field *T) func(T, error) error {
	return func(value T, err error) error {
		if err == nil {
			*field = value
		}
		return err
	}
}

func (s *Settings) setSource(section, key, source string) {
	if s.Sources == nil {
		s.Sources = map[string]string{}
	}
	s.Sources[section+"."+key] = source
}

// setOpen adds a service, or replaces the one of the same name.
func (s *Settings) setOpen(name, value, source string) error {
	if value == "" {
		return firewall.CheckServiceName(name)
	}
	var service firewall.Service
	var err error
	if value == Closed {
		err = firewall.CheckServiceName(name)
	} else {
		service, err = firewall.ParseService(name, value)
	}
	if err != nil {
		return err
	}
	service.Source = source
	s.setSource("open", name, source)
	s.Closed = slices.DeleteFunc(slices.Clone(s.Closed), func(c string) bool { return c == name })
	i := slices.IndexFunc(s.Open, func(o firewall.Service) bool { return o.Name == name })
	if i >= 0 {
		s.Replaced = append(slices.Clone(s.Replaced), s.Open[i])
	}
	switch {
	case value == Closed && i >= 0:
		s.Open = slices.Delete(slices.Clone(s.Open), i, i+1)
		fallthrough
	case value == Closed:
		s.Closed = append(s.Closed, name)
	case i >= 0:
		s.Open[i] = service
	default:
		s.Open = append(s.Open, service)
	}
	return nil
}

// zoneClash finds an interface that is said to be both public and private.
func (s *Settings) zoneClash() (Problem, bool) {
	for _, name := range s.Private {
		if slices.Contains(s.Public, name) {
			return Problem{File: s.Sources["interfaces.private"], Key: "interfaces.private",
				Msg: fmt.Sprintf("%q is public too (%s): an interface has one zone", name, s.Sources["interfaces.public"])}, true
		}
	}
	return Problem{}, false
}

// CheckProfileName says what is wrong with a profile's name, or nil. It is a
// file's name too: NAME.ini.
func CheckProfileName(name string) error {
	const alphanumeric = "abcdefghijklmnopqrstuvwxyz0123456789"
	switch {
	case name == "" || len(name) > 40 || strings.Trim(name, alphanumeric+"+._-") != "" || !strings.ContainsRune(alphanumeric, rune(name[0])):
		return fmt.Errorf("profile name %s: want 1 to 40 of a-z, 0-9, \"+\", \".\", \"_\" and \"-\", a letter or digit first", firewall.Quote(name))
	case name == Auto:
		return fmt.Errorf("profile name %q: it stands for the profile that the agent chooses", name)
	}
	return nil
}

func parseProfile(value string) (string, error) {
	if value == Auto {
		return value, nil
	}
	return value, CheckProfileName(value)
}

// ParseYesNo reads yes or no.
func ParseYesNo(value string) (bool, error) {
	word, err := oneOf(value, "yes", "no")
	return word == "yes", err
}

func oneOf(value string, words ...string) (string, error) {
	if slices.Contains(words, value) {
		return value, nil
	}
	last := len(words) - 1
	return "", fmt.Errorf("%s: want %s or %s", firewall.Quote(value), strings.Join(words[:last], ", "), words[last])
}

// list takes apart what commas, white space or both separate. Each entry will
// be looked for among the others, so there is a limit.
func list(value, want string) ([]string, error) {
	const most = 256
	words := strings.Fields(strings.ReplaceAll(value, ",", " "))
	switch {
	case len(words) == 0:
		return nil, fmt.Errorf("%s: want %s", firewall.Quote(value), want)
	case len(words) > most:
		return nil, fmt.Errorf("a list of %d: want at most %d", len(words), most)
	}
	return words, nil
}

func parsePortList(value string) ([]uint16, error) {
	if value == Auto {
		return nil, nil
	}
	const want = "auto, or ports from 1 to 65535 such as 22, 2222"
	words, err := list(value, want)
	if err != nil {
		return nil, err
	}
	var (
		ports []uint16
		errs  []error
	)
	for _, w := range words {
		n, err := strconv.ParseUint(w, 10, 16)
		if err != nil || n == 0 || w[0] == '0' {
			errs = append(errs, fmt.Errorf("%s: want %s", firewall.Quote(w), want))
		} else if !slices.Contains(ports, uint16(n)) {
			ports = append(ports, uint16(n))
		}
	}
	return ports, errors.Join(errs...)
}

func parseAllow(value string) (Allow, error) {
	const want = "want client, any or none, and addresses and CIDRs, each with \"until TIME\" behind it if it is to end"
	words := strings.Fields(strings.ReplaceAll(value, ",", " "))
	if len(words) == 0 {
		return Allow{}, fmt.Errorf("%s holds no address", firewall.Quote(value))
	}
	var (
		a    = Allow{Mode: AllowList}
		errs []error
	)
	for i := 0; i < len(words); i++ {
		switch mode := AllowMode(words[i]); mode {
		case AllowClient, AllowAny, AllowNone:
			if a.Mode != AllowList && a.Mode != mode {
				errs = append(errs, fmt.Errorf("%s: %s and %s do not go together: %s", firewall.Quote(value), a.Mode, mode, want))
			}
			a.Mode = mode
			continue
		}
		p, err := firewall.ParseSource(words[i])
		if err != nil {
			errs = append(errs, err)
		}
		if i+1 == len(words) || words[i+1] != until {
			if err == nil && !slices.Contains(a.List, p) {
				a.List = append(a.List, p)
			}
			continue
		}
		end := ""
		if i += 2; i < len(words) {
			end = words[i]
		}
		t, timeErr := firewall.ParseTime(end)
		if timeErr != nil {
			errs = append(errs, fmt.Errorf("until: %w", timeErr))
		}
		if err == nil && timeErr == nil {
			a.Timed = append(a.Timed, firewall.TimedSource{From: p, Until: t})
		}
	}
	switch {
	case len(errs) > 0:
	case a.Mode == AllowNone && len(a.List) > 0:
		errs = append(errs, fmt.Errorf("%s: none is nobody but those with an end: leave it out", firewall.Quote(value)))
	case a.Mode == AllowList && len(a.List) == 0:
		errs = append(errs, fmt.Errorf("%s: nobody is left when that has ended: want client, any, none, or an address that stays, too", firewall.Quote(value)))
	}
	return a, errors.Join(errs...)
}

// parseRate reads N/second, minute, hour or day, or off. 10000 in a second is
// the most that iptables' limits count (XT_HASHLIMIT_SCALE). A rate that
// iptables would make another of could never be verified.
func parseRate(value string) (firewall.Rate, error) {
	if value == "off" {
		return firewall.Rate{}, nil
	}
	number, unit, _ := strings.Cut(value, "/")
	var per firewall.Unit
	switch unit {
	case "second", "sec":
		per = firewall.Second
	case "minute", "min":
		per = firewall.Minute
	case "hour":
		per = firewall.Hour
	case "day":
		per = firewall.Day
	}
	n, err := strconv.ParseUint(number, 10, 32)
	if err != nil || per == "" || n < 1 || n > 10000 {
		return firewall.Rate{}, fmt.Errorf("%s: want 1 to 10000 in a second, minute, hour or day, such as 30/minute, or off", firewall.Quote(value))
	}
	rate := firewall.Rate{N: uint32(n), Per: per}
	if _, exact := rate.Canonical(); !exact {
		return firewall.Rate{}, fmt.Errorf("%s: iptables cannot count that exactly: want a round number, such as 100/second or 600/minute", firewall.Quote(value))
	}
	return rate, nil
}

// parseDuration reads a time to wait, or 0.
func parseDuration(value string) (time.Duration, error) {
	if value == "0" {
		return 0, nil
	}
	const most = 30 * 24 * time.Hour
	d, err := time.ParseDuration(value)
	if err != nil || d != 0 && d < time.Second || d > most {
		return 0, fmt.Errorf("%s: want a time from 1s to 720h, such as 30m or 1h30m, or 0 for never", firewall.Quote(value))
	}
	return d, nil
}

// parseInterfaces reads names of interfaces; auto, where it may be said, is nil.
func parseInterfaces(value string, auto bool) ([]string, error) {
	if auto && value == Auto {
		return nil, nil
	}
	const want = "names of interfaces such as eth0 or wg*"
	words, err := list(value, want)
	if err != nil {
		return nil, err
	}
	var (
		names []string
		errs  []error
	)
	for _, w := range words {
		switch {
		case w == Auto || firewall.IsZoneWord(w):
			errs = append(errs, fmt.Errorf("%s: want %s", firewall.Quote(w), want))
		case len(w) > 16: // 15 characters and a "*"
			errs = append(errs, fmt.Errorf("interface name %s: longer than the kernel's 15 characters", firewall.Quote(w)))
		default:
			if err := firewall.CheckInterfaceName(w, true); err != nil {
				errs = append(errs, err)
			} else if !slices.Contains(names, w) {
				names = append(names, w)
			}
		}
	}
	return names, errors.Join(errs...)
}
