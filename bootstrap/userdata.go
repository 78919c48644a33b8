package bootstrap

import (
	_ "embed"
	"errors"
	"fmt"
	"net/url"
	"regexp"
	"strings"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/settings"
)

// MessageFile is the message that user-data shows at every login until the
// first bootstrap has succeeded, which removes it. It is also how user-data
// knows, at the next boot, that there still is something to do.
const MessageFile = "/etc/motd.d/basicfw-bootstrap"

//go:embed user-data.tmpl
var userDataTemplate string

// UserDataOptions say what user-data is to set up.
type UserDataOptions struct {
	// RPMURL is where the package is: https, or http with a checksum.
	RPMURL string
	// SHA256 is the package's checksum in hexadecimal; empty is not checked.
	SHA256 string
	// KeyURL is where the key is that must have signed the package, https
	// only; empty is not checked.
	KeyURL string
	// ClientIP is a list of addresses and networks that may log in over SSH;
	// empty leaves it to bootstrap to find that out.
	ClientIP string
	// Profile is the profile's name; empty leaves it to bootstrap to choose.
	Profile string
}

// UserData gives the cloud-config that closes a new server: at the network
// stage of its first boot, before sshd. It fits every cloud-init since 18
// (EL 8). The settings are flags, because write_files comes later than
// bootcmd. The error is an *InvalidError with everything that is wrong.
func UserData(o UserDataOptions) ([]byte, error) {
	sum := strings.ToLower(strings.TrimSpace(o.SHA256))
	clients, errs := firewall.ParseSources(o.ClientIP)
	for i, err := range errs {
		errs[i] = fmt.Errorf("--client-ip: %w", err)
	}
	errs = append(errs, checkURL("--rpm", o.RPMURL, sum != ""))
	if sum != "" && !regexp.MustCompile(`^[0-9a-f]{64}$`).MatchString(sum) {
		errs = append(errs, fmt.Errorf("--sha256: %s: want 64 hexadecimal digits, as sha256sum prints them", firewall.Quote(o.SHA256)))
	}
	if o.KeyURL != "" {
		errs = append(errs, checkURL("--gpg-key", o.KeyURL, false))
	}
	var flags []string
	if o.Profile != "" && o.Profile != settings.Auto {
		if err := settings.CheckProfileName(o.Profile); err != nil {
			errs = append(errs, fmt.Errorf("--profile: %w", err))
		}
		flags = append(flags, "--profile", o.Profile)
	}
	if len(clients) > 0 {
		flags = append(flags, "--client-ip", strings.Join(firewall.FormatPrefixes(clients), ","))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, &InvalidError{err: err}
	}

	// Nothing below needs quoting any more: what was accepted has no quote, no
	// white space and no brace, and stands within single quotes of the shell or
	// has none of its special characters.
	var signed, key string
	if o.KeyURL != "" {
		signed = "signed && "
		key = strings.ReplaceAll(keyCheck, "@KEYURL@", o.KeyURL)
	}
	return []byte(strings.NewReplacer("@MESSAGE@", MessageFile, "@RPM@", o.RPMURL, "@SHA256@", sum, "@FLAGS@", strings.Join(flags, " "),
		"@SIGNED@", signed, "@KEY@", key).Replace(userDataTemplate)), nil
}

// keyCheck looks for a signature by that key and by no other that the system
// trusts: in a database of its own. The system's gets it too, because rpm may
// be set up to install nothing else, and for updates. rpm -K is content with a
// package that nobody signed, so its words are looked at: "digests signatures
// OK", and before rpm 4.14 "(md5) pgp md5 OK".
const keyCheck = `      signed() {
        fetch '@KEYURL@' "$dir/key" && rpm --dbpath "$dir/db" --import "$dir/key" || return
        case $(LC_ALL=C rpm --dbpath "$dir/db" -K "$dir/agent.rpm") in
          *' signatures OK'|*' pgp '*' OK') rpm --import "$dir/key" && return;;
        esac
        echo 'basicfw: the package is not signed by that key' >&2
        return 1
      }
`

// checkURL says why text cannot be a download's address, or nil. What a URL
// may consist of (RFC 3986) is all harmless within single quotes, but for the
// single quote itself.
func checkURL(flag, text string, checksum bool) error {
	refuse := func(why string) error { return fmt.Errorf("%s: %s %s", flag, firewall.Quote(text), why) }
	if text == "" {
		return fmt.Errorf("%s: where is it? Want a URL such as https://example.com/basicfw-agent.rpm", flag)
	}
	u, err := url.Parse(text)
	switch {
	case len(text) > 2000:
		return refuse("is longer than 2000 characters")
	case err != nil || u.Host == "" || u.Opaque != "" || !regexp.MustCompile(`^https?://[A-Za-z0-9._~:/?\[\]@!$&()*+,;=%-]+$`).MatchString(text):
		return refuse("is not a URL such as https://example.com/basicfw-agent.rpm")
	case u.User != nil:
		return refuse("has a password: every user of the server can read its user-data")
	case u.Scheme == "http" && !checksum:
		want := "want https"
		if flag == "--rpm" {
			want += ", or --sha256 with it"
		}
		return refuse("comes over http, where anybody on the way can put another file: " + want)
	}
	return nil
}
