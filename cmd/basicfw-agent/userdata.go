package main

import (
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/bootstrap"
)

// userDataCmd returns the command user-data, which works on every system.
func userDataCmd(out io.Writer, warn func(...any)) *cobra.Command {
	var o bootstrap.UserDataOptions
	var caFile string
	cmd := &cobra.Command{
		Use:   "user-data",
		Short: "Print cloud-init user data that bootstraps a new server",
		Long: `Print a cloud-config. Paste it into the provider's "user data" field when you
create a server. At the first boot it installs the package and closes the
machine before sshd answers. This command does not require root.`,
		Example: `  basicfw-agent user-data --rpm https://example.com/basicfw-agent.x86_64.rpm \
    --sha256 $(sha256sum <basicfw-agent.x86_64.rpm | cut -c 1-64) \
    --client-ip 203.0.113.9 --profile web+mail`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			if caFile != "" {
				var err error
				if o.CA, err = os.ReadFile(caFile); err != nil {
					return fmt.Errorf("--ca-file: %w", err)
				}
				if len(o.CA) == 0 {
					return fmt.Errorf("--ca-file: %s is empty", caFile)
				}
			}
			data, err := bootstrap.UserData(o)
			if err != nil {
				return err
			}
			if o.Unchecked() {
				warn("nothing checks the package: a person who replaces it is root on the server; use --sha256 or --gpg-key")
			}
			clients, _ := firewall.ParseSources(o.ClientIP)
			for _, p := range clients {
				if text := firewall.TemporaryHint(p); text != "" {
					warn(text)
				}
			}
			_, err = out.Write(data)
			return err
		},
	}
	cmd.Flags().StringVar(&o.RPMURL, "rpm", "", "URL of the package: https, or http with --sha256")
	cmd.Flags().StringVar(&o.RepoURL, "repo", "", "URL of a dnf repository with the package, instead of --rpm: https, or http with --gpg-key")
	cmd.Flags().StringVar(&o.SHA256, "sha256", "", "SHA-256 checksum of the package")
	cmd.Flags().StringVar(&o.KeyURL, "gpg-key", "", "https URL of the key that must have signed the package")
	cmd.Flags().StringVar(&caFile, "ca-file", "", "file with the certificate of a private CA, the only one to trust for the URLs")
	cmd.Flags().BoolVar(&o.MIME, "mime", false, "print a multipart message, to which parts of your own can be added")
	cmd.Flags().StringVar(&o.ClientIP, "client-ip", "", "addresses and CIDRs that may log in over SSH, separated by commas")
	cmd.Flags().StringVar(&o.Profile, "profile", "", "auto, web-only, web+mail, or a profile of your own")
	return cmd
}
