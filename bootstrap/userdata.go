package bootstrap

import (
	"bytes"
	"embed"
	"encoding/pem"
	"errors"
	"fmt"
	"net/url"
	"regexp"
	"strings"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// MessageFile is a message that user-data shows at every login. The first
// successful bootstrap removes it; while it exists, each boot tries again.
const MessageFile = "/etc/motd.d/basicfw-bootstrap"

// userData are the parts of the user-data. script.sh installs the package and runs
// bootstrap. Values replace the names between two @.
//
//go:embed userdata
var userData embed.FS

// caFile is where user-data writes a private CA.
const caFile = "/etc/pki/basicfw-ca.pem"

// maxCA limits a CA: some clouds accept no user-data of more than 16 KiB.
const maxCA = 4096

// InvalidError reports invalid settings or flags, which the user has to change.
type InvalidError struct {
	err error
	// OnlyClient is set if only the named client was refused.
	OnlyClient bool
}

func (e *InvalidError) Error() string { return e.err.Error() }
func (e *InvalidError) Unwrap() error { return e.err }

// UserDataOptions are the values that are filled into the user-data. Either RPMURL or
// RepoURL is set.
type UserDataOptions struct {
	RPMURL   string // the package: https, or http with a checksum
	RepoURL  string // a dnf repository with the package: https, or http with a key
	SHA256   string // the checksum of the package at RPMURL in hexadecimal; empty: not checked
	KeyURL   string // the key that must have signed the package, https only; empty: not checked
	ClientIP string // a list of addresses and networks that may log in over SSH; empty: detected by bootstrap
	Profile  string // the profile's name; empty: chosen by bootstrap
	CA       []byte // certificates in PEM: the only CA to trust for the URLs; empty: those of the image
	MIME     bool   // a multipart message, to which other parts can be added
}

// Unchecked reports whether nothing proves that the package is the expected one.
func (o UserDataOptions) Unchecked() bool { return strings.TrimSpace(o.SHA256) == "" && o.KeyURL == "" }

// UserData returns the cloud-config that closes a new server in the network
// stage of its first boot, before sshd starts. It works with cloud-init 18 (EL 8)
// and later. Settings are passed as flags, because write_files runs after
// bootcmd. The error is an *InvalidError that lists all problems.
func UserData(o UserDataOptions) ([]byte, error) {
	sum := strings.ToLower(strings.TrimSpace(o.SHA256))
	clients, errs := firewall.ParseSources(o.ClientIP)
	for i, err := range errs {
		errs[i] = fmt.Errorf("--client-ip: %w", err)
	}
	switch {
	case o.RepoURL == "":
		errs = append(errs, checkURL("--rpm", o.RPMURL, "--sha256", sum != ""))
	case o.RPMURL != "" || sum != "":
		errs = append(errs, errors.New("--repo: it excludes --rpm and --sha256: the repository has the checksums"))
	default:
		errs = append(errs, checkURL("--repo", o.RepoURL, "--gpg-key", o.KeyURL != ""))
	}
	if sum != "" && !regexp.MustCompile(`^[0-9a-f]{64}$`).MatchString(sum) {
		errs = append(errs, fmt.Errorf("--sha256: %s: want 64 hexadecimal digits, as sha256sum prints them", firewall.Quote(o.SHA256)))
	}
	if o.KeyURL != "" {
		errs = append(errs, checkURL("--gpg-key", o.KeyURL, "", false))
	}
	ca, err := certificates(o.CA)
	if err != nil {
		errs = append(errs, fmt.Errorf("--ca-file: %w", err))
	}
	var flags []string
	if o.Profile != "" && o.Profile != "auto" {
		if err := firewall.CheckProfileName(o.Profile); err != nil {
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

	// No value needs quoting: none contains a quote, white space or a brace, and
	// each is in single quotes or free of the shell's special characters.
	values := map[string]string{"MESSAGE": MessageFile, "URL": o.RPMURL, "SUM": sum, "KEY": o.KeyURL, "FLAGS": strings.Join(flags, " "),
		"CA": "", "CURL_CA": "", "WGET_CA": "", "REPO_CA": "", "PACKAGES": ""}
	yaml := "false"
	if o.KeyURL != "" {
		yaml = "true\n    repo_gpgcheck: true\n    gpgkey: '" + o.KeyURL + "'"
	}
	if ca != "" {
		values["CA"] = "# The only CA that is trusted for these URLs.\nca=" + caFile + "\nmkdir -p /etc/pki\ncat >$ca <<'END'\n" + ca + "END"
		values["CURL_CA"], values["WGET_CA"] = "--cacert $ca ", "--ca-certificate=$ca "
		values["REPO_CA"] = "sslcacert=" + caFile + `\n`
		yaml += "\n    sslcacert: " + caFile
	}
	values["CHECK"], values["ADD"] = yaml, ""
	if !o.MIME {
		values["ADD"] = " Add\n# your own packages to the list: a second one would replace it."
	}
	download := "rpm.sh"
	if o.RepoURL != "" {
		download, values["URL"] = "repo.sh", o.RepoURL
		values["PACKAGES"] = fill("repo.yaml", values)
	}
	values["SOURCE"], values["GET"], _ = strings.Cut(fill(download, values), "\n\n")
	values["SCRIPT"] = fill("script.sh", values)
	if o.MIME {
		return []byte(fill("mime.txt", values) + "\n"), nil
	}
	values["SCRIPT"] = regexp.MustCompile(`(?m)^.`).ReplaceAllString(values["SCRIPT"], "      $0")
	return []byte(fill("config.yaml", values) + "\n"), nil
}

// fill returns a part of the user-data with its values, without the last newline. A
// line that contains only the name of an empty value is omitted.
func fill(part string, values map[string]string) string {
	text, err := userData.ReadFile("userdata/" + part)
	if err != nil {
		panic(err) // it is embedded
	}
	var pairs []string
	for name, value := range values {
		line := "\n" + value + "\n"
		if value == "" {
			line = "\n"
		}
		pairs = append(pairs, "\n@"+name+"@\n", line, "@"+name+"@", value)
	}
	return strings.TrimSuffix(strings.NewReplacer(pairs...).Replace(string(text)), "\n")
}

// certificates returns the certificates in PEM, without any other content of the file.
func certificates(file []byte) (string, error) {
	var out bytes.Buffer
	for block, rest := pem.Decode(file); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			return "", fmt.Errorf("contains %s: want certificates only", firewall.Quote(block.Type))
		}
		block.Headers = nil
		if err := pem.Encode(&out, block); err != nil {
			return "", err
		}
	}
	switch {
	case len(file) > 0 && out.Len() == 0:
		return "", errors.New("contains no certificate in PEM form")
	case out.Len() > maxCA:
		return "", fmt.Errorf("contains more than %d bytes of certificates: want only that of the CA", maxCA)
	}
	return out.String(), nil
}

// checkURL returns an error if text is not an acceptable download URL. http is
// acceptable if the download is checked, which needs another flag. All characters of
// a URL (RFC 3986) are harmless in single quotes, except the single quote itself.
func checkURL(flag, text, other string, checked bool) error {
	refuse := func(why string) error { return fmt.Errorf("%s: %s %s", flag, firewall.Quote(text), why) }
	if text == "" {
		return fmt.Errorf("%s: missing: want a URL such as https://example.com/basicfw-agent.rpm", flag)
	}
	u, err := url.Parse(text)
	switch {
	case len(text) > 2000:
		return refuse("is longer than 2000 characters")
	case err != nil || u.Host == "" || u.Opaque != "" || !regexp.MustCompile(`^https?://[A-Za-z0-9._~:/?\[\]@!$&()*+,;=%-]+$`).MatchString(text):
		return refuse("is not a URL such as https://example.com/basicfw-agent.rpm")
	case u.User != nil:
		return refuse("contains a password: every user of the server can read its user-data")
	case u.Scheme == "http" && !checked:
		want := "want https"
		if other != "" {
			want += ", or " + other + " in addition"
		}
		return refuse("uses http, over which the file can be replaced in transit: " + want)
	}
	return nil
}
