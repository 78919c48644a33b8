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

const (
	DefaultFile = "/etc/basicfw/agent.ini" // the administrator's settings
	LocalName   = "local.ini"              // written by commands, in the same directory; overrides it

	Auto   = "auto"   // the value of a setting that the agent detects
	Closed = "closed" // the value of a service in [open] that stays closed, whatever else opens it
	until  = "until"  // between an address and the time when its access expires

	// What to do about other programs that manage the firewall.
	TakeOver = "takeover"
	Refuse   = "refuse"
)

// AllowMode is a rule for who may log in over SSH.
type AllowMode string

// The modes. AllowClient is the provisioning client, named or detected. AllowList is
// only the listed addresses.
const (
	AllowClient AllowMode = "client"
	AllowAny    AllowMode = "any"
	AllowNone   AllowMode = "none"
	AllowList   AllowMode = "list"
)

// Allow is who may log in over SSH: the clients of the mode, and the listed ones.
type Allow struct {
	Mode AllowMode
	List []netip.Prefix // nil if Mode is AllowNone, not empty if it is AllowList without File
	File string         // a file with more networks; "" if there is none
	// Timed may log in until a time. If List is empty, Mode is not AllowList.
	Timed []firewall.TimedSource
}

// String returns the value as written in the settings.
func (a Allow) String() string {
	var words []string
	if a.Mode != AllowList {
		words = append(words, string(a.Mode))
	}
	words = append(words, firewall.FormatPrefixes(a.List)...)
	if a.File != "" {
		words = append(words, "file:"+a.File)
	}
	for _, t := range a.Timed {
		words = append(words, firewall.FormatPrefix(t.From)+" "+until+" "+firewall.FormatTime(t.Until))
	}
	return strings.Join(words, ", ")
}

// Settings is the administrator's settings. A key that is not set has its default.
// A copy shares Open and Sources with the original.
type Settings struct {
	Profile    string // Auto, or the name of a profile, which may not exist
	Backend    string // Auto, "iptables" or "nftables"
	OnConflict string // TakeOver or Refuse

	SSHPorts     []uint16 // nil is auto
	Allow        Allow
	ClientIP     []netip.Prefix // the named provisioning clients; nil is none
	ClientIPText string         // as the administrator wrote them
	Limit        firewall.Rate  // for new SSH connections from one source; zero is none
	// ConfirmWithin is how long a detected client has to confirm; 0 is no limit.
	ConfirmWithin time.Duration

	Public  []string // interfaces, a final "*" matches any suffix; nil is auto
	Private []string // as Public
	Trusted []string // nil is none

	// Published is firewall.PublishedProfile or PublishedLeave.
	Published string

	Open     []firewall.Service // in addition to the profile's; Source is the file and line
	Closed   []string           // names of services that stay closed
	Replaced []firewall.Service // of agent.ini, overridden in local.ini

	Blocks []Block // the lists of blocked networks
	// BlocksBeneath are the names of lists of agent.ini that local.ini overrides.
	BlocksBeneath []string
	// ForceBlocks is set if lists may contain allowed SSH sources, on the administrator's
	// responsibility. NewList is the content of a file that a command is about to write;
	// it may not without ForceBlocks.
	ForceBlocks bool
	NewList     map[string]NewList

	Tests []Assertion // that every change must pass

	LogLevel string // a level of logrus
	LogDrops bool

	// Sources maps section.key to where the setting came from:
	// "/etc/basicfw/local.ini:7", "--client-ip". A default has none.
	Sources map[string]string
}

// Defaults returns the settings of an empty file.
func Defaults() Settings {
	return Settings{
		Profile:       Auto,
		Backend:       Auto,
		OnConflict:    TakeOver,
		Allow:         Allow{Mode: AllowClient},
		Limit:         firewall.Rate{N: 30, Per: firewall.Minute},
		ConfirmWithin: 30 * time.Minute,
		Published:     firewall.PublishedProfile,
		LogLevel:      "info",
		LogDrops:      true,
		Sources:       map[string]string{},
	}
}

// Load reads config and then local.ini in the same directory, which overrides it key
// by key. An empty config is DefaultFile, which may be missing; a named one may not.
// The error is Errors with all problems of both files. The settings returned with it
// contain every valid value.
func Load(sys *system.System, config string) (Settings, error) {
	return load(sys, config, func(file string) (*Document, Errors) {
		if !sys.Exists(file) {
			return &Document{File: file}, nil
		}
		return Read(sys, file)
	})
}

// LoadEdited is Load with text in place of the content of local.ini.
func LoadEdited(sys *system.System, config string, text []byte) (Settings, error) {
	return load(sys, config, func(file string) (*Document, Errors) { return Parse(file, text) })
}

// LocalFile returns the path of local.ini, in the directory of config.
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
	doc, problems := local(LocalFile(config))
	errs = append(errs, s.decode(doc, problems)...)
	for _, name := range s.Private {
		if slices.Contains(s.Public, name) {
			errs = append(errs, Problem{File: s.Sources["interfaces.private"], Key: "interfaces.private",
				Msg: fmt.Sprintf("%q is also public (%s): an interface has one zone", name, s.Sources["interfaces.public"])})
			break
		}
	}
	return s, errs.Err()
}

// decode overrides s with a document's values and adds their errors to the
// document's own problems.
func (s *Settings) decode(doc *Document, problems Errors) Errors {
	for _, section := range doc.Sections {
		if _, known := keysOf(section.Name); !known {
			problems.Add(doc.File, section.Line, "", unknownSection(" ["+section.Name+"]"))
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

// Set assigns a value to one setting, such as a flag's with source "--client-ip". An
// empty or invalid value changes nothing.
func (s *Settings) Set(section, key, value, source string) (errs Errors) {
	errs.Add(source, 0, section+"."+key, s.set(section, key, value, source))
	return errs
}

// layout is the sections and their keys, in the order of the manual. The keys of
// [open] are names of services, and those of [block] names of lists.
var layout = []struct {
	name string
	keys []string
}{
	{"agent", []string{"profile", "backend", "on_conflict"}},
	{"ssh", []string{"ports", "allow", "client_ip", "limit", "confirm_within"}},
	{"interfaces", []string{"public", "private", "trusted"}},
	{"containers", []string{"published"}},
	{"open", nil},
	{"block", nil},
	{"test", []string{"allow", "deny"}},
	{"log", []string{"level", "drops"}},
}

func keysOf(section string) (keys []string, known bool) {
	for _, l := range layout {
		if l.name == section {
			return l.keys, true
		}
	}
	return nil, false
}

func unknownSection(section string) error {
	var names []string
	for _, l := range layout {
		names = append(names, "["+l.name+"]")
	}
	return fmt.Errorf("unknown section%s: want one of %s", section, strings.Join(names, ", "))
}

// unknownKey returns an error that names the section's keys, or the key's section.
func unknownKey(section, key string, keys []string) error {
	for _, l := range layout {
		if slices.Contains(l.keys, key) && l.name != "test" {
			return fmt.Errorf("belongs in section [%s]", l.name)
		}
	}
	return fmt.Errorf("unknown key: [%s] has %s", section, strings.Join(keys, ", "))
}

// set checks and assigns a value; nothing else does.
func (s *Settings) set(section, key, value, source string) error {
	value = strings.TrimSpace(value)
	if section == "open" {
		return s.setOpen(key, value, source)
	}
	if section == "block" {
		return s.setBlock(key, value, source)
	}
	keys, known := keysOf(section)
	switch {
	case !known:
		return unknownSection("")
	case !slices.Contains(keys, key):
		return unknownKey(section, key, keys)
	case value == "":
		return nil
	}
	if err := setters[section+"."+key](s, value); err != nil {
		return err
	}
	s.setSource(section, key, source)
	return nil
}

// setters parse a value into its field, by section.key as in layout.
var setters = map[string]func(s *Settings, value string) error{
	"agent.profile":     func(s *Settings, v string) error { return into(&s.Profile)(parseProfile(v)) },
	"agent.backend":     func(s *Settings, v string) error { return into(&s.Backend)(oneOf(v, Auto, "iptables", "nftables")) },
	"agent.on_conflict": func(s *Settings, v string) error { return into(&s.OnConflict)(oneOf(v, TakeOver, Refuse)) },
	"ssh.ports":         func(s *Settings, v string) error { return into(&s.SSHPorts)(parsePortList(v)) },
	"ssh.allow":         func(s *Settings, v string) error { return into(&s.Allow)(parseAllow(v)) },
	"ssh.client_ip": func(s *Settings, v string) error {
		sources, errs := firewall.ParseSources(v)
		if len(errs) == 0 {
			s.ClientIP, s.ClientIPText = sources, strings.Join(strings.Fields(v), " ")
		}
		return errors.Join(errs...)
	},
	"ssh.limit":          func(s *Settings, v string) error { return into(&s.Limit)(parseRate(v)) },
	"ssh.confirm_within": func(s *Settings, v string) error { return into(&s.ConfirmWithin)(parseDuration(v)) },
	"interfaces.public":  func(s *Settings, v string) error { return into(&s.Public)(parseInterfaces(v, true)) },
	"interfaces.private": func(s *Settings, v string) error { return into(&s.Private)(parseInterfaces(v, true)) },
	"interfaces.trusted": func(s *Settings, v string) error { return into(&s.Trusted)(parseInterfaces(v, false)) },
	"containers.published": func(s *Settings, v string) error {
		return into(&s.Published)(oneOf(v, firewall.PublishedProfile, firewall.PublishedLeave))
	},
	"test.allow": func(s *Settings, v string) error { return s.setTests(true, v) },
	"test.deny":  func(s *Settings, v string) error { return s.setTests(false, v) },
	"log.level": func(s *Settings, v string) error {
		return into(&s.LogLevel)(oneOf(v, "error", "warn", "warning", "info", "debug", "trace"))
	},
	"log.drops": func(s *Settings, v string) error { return into(&s.LogDrops)(ParseYesNo(v)) },
}

// into returns a function that sets a field unless there is an error.
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

// setOpen adds a service, or replaces the one with the same name.
func (s *Settings) setOpen(name, value, source string) error {
	if value == "" {
		return firewall.CheckServiceName(name)
	}
	var service firewall.Service
	err := firewall.CheckServiceName(name)
	if value != Closed {
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

func parseProfile(value string) (string, error) {
	if value == Auto {
		return value, nil
	}
	return value, firewall.CheckProfileName(value)
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

// parseList parses a list separated by commas, white space or both, and drops
// duplicates. Each entry is compared with all others, so their number is limited.
func parseList[T comparable](value, want string, parse func(word string) (T, error)) ([]T, error) {
	const most = 256
	words := strings.Fields(strings.ReplaceAll(value, ",", " "))
	switch {
	case len(words) == 0:
		return nil, fmt.Errorf("%s: want %s", firewall.Quote(value), want)
	case len(words) > most:
		return nil, fmt.Errorf("a list of %d: want at most %d", len(words), most)
	}
	var list []T
	var errs []error
	for _, w := range words {
		if v, err := parse(w); err != nil {
			errs = append(errs, err)
		} else if !slices.Contains(list, v) {
			list = append(list, v)
		}
	}
	return list, errors.Join(errs...)
}

func parsePortList(value string) ([]uint16, error) {
	if value == Auto {
		return nil, nil
	}
	const want = "auto, or ports from 1 to 65535 such as 22, 2222"
	return parseList(value, want, func(w string) (uint16, error) {
		n, err := strconv.ParseUint(w, 10, 16)
		if err != nil || n == 0 || w[0] == '0' {
			return 0, fmt.Errorf("%s: want %s", firewall.Quote(w), want)
		}
		return uint16(n), nil
	})
}

func parseAllow(value string) (Allow, error) {
	const want = "want client, any or none, addresses and CIDRs, each with \"until TIME\" if temporary, and file:PATH"
	words := strings.Fields(strings.ReplaceAll(value, ",", " "))
	if len(words) == 0 {
		return Allow{}, fmt.Errorf("%s contains no address", firewall.Quote(value))
	}
	a := Allow{Mode: AllowList}
	var errs []error
	for i := 0; i < len(words); i++ {
		switch mode := AllowMode(words[i]); mode {
		case AllowClient, AllowAny, AllowNone:
			if a.Mode != AllowList && a.Mode != mode {
				errs = append(errs, fmt.Errorf("%s: %s and %s exclude each other: %s", firewall.Quote(value), a.Mode, mode, want))
			}
			a.Mode = mode
			continue
		}
		file, err := firewall.ParseFile(words[i])
		if file != "" && a.File != "" {
			err = fmt.Errorf("%s: want one file", firewall.Quote(value))
		}
		if file != "" || err != nil {
			a.File, errs = file, append(errs, err)
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
	case errors.Join(errs...) != nil:
	case a.Mode == AllowNone && (len(a.List) > 0 || a.File != ""):
		errs = append(errs, fmt.Errorf("%s: none allows only temporary addresses: leave it out", firewall.Quote(value)))
	case a.Mode == AllowList && len(a.List) == 0 && a.File == "":
		errs = append(errs, fmt.Errorf("%s: all addresses are temporary: want also client, any, none or a permanent address", firewall.Quote(value)))
	}
	return a, errors.Join(errs...)
}

// parseRate reads a rate, or off.
func parseRate(value string) (firewall.Rate, error) {
	if value == "off" {
		return firewall.Rate{}, nil
	}
	rate, err := firewall.ParseRate(value)
	if err != nil {
		err = fmt.Errorf("%w, or off", err)
	}
	return rate, err
}

// parseDuration reads a duration, or 0 for never.
func parseDuration(value string) (time.Duration, error) {
	if d, err := time.ParseDuration(value); err == nil && d == 0 {
		return 0, nil
	}
	d, err := firewall.ParseDuration(value)
	if err != nil {
		err = fmt.Errorf("%w, or 0 for never", err)
	}
	return d, err
}

// parseInterfaces reads names of interfaces. For the word auto, it returns nil if
// auto is set, otherwise an error.
func parseInterfaces(value string, auto bool) ([]string, error) {
	if auto && value == Auto {
		return nil, nil
	}
	const want = "names of interfaces such as eth0 or wg*"
	return parseList(value, want, func(w string) (string, error) {
		switch {
		case w == Auto || firewall.IsZoneWord(w):
			return "", fmt.Errorf("%s: want %s", firewall.Quote(w), want)
		case len(w) > 16: // 15 characters and a "*"
			return "", fmt.Errorf("interface name %s: longer than the kernel's 15 characters", firewall.Quote(w))
		}
		return w, firewall.CheckInterfaceName(w, true)
	})
}
