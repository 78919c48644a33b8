package main

import (
	"github.com/spf13/cobra"

	"github.com/basicfw/basicfw-agent/bootstrap"
)

func (a *app) userDataCmd() *cobra.Command {
	var o bootstrap.UserDataOptions
	cmd := &cobra.Command{
		Use:   "user-data",
		Short: "Print a cloud-config to paste when a server is created",
		Long: `Print a cloud-config for the field "user data" of a provider's page where a
server is created. At the first boot it installs the package and closes the
machine before sshd answers. Printing it needs no root.`,
		Example: `  basicfw-agent user-data --rpm https://example.com/basicfw-agent.x86_64.rpm \
    --sha256 $(sha256sum <basicfw-agent.x86_64.rpm | cut -c 1-64) \
    --client-ip 203.0.113.9 --profile web+mail`,
		Args: noArgs,
		RunE: func(*cobra.Command, []string) error {
			data, err := bootstrap.UserData(o)
			if err != nil {
				return err
			}
			_, err = a.stdout.Write(data)
			return err
		},
	}
	cmd.Flags().StringVar(&o.RPMURL, "rpm", "", "where the package is: an https URL, or http with --sha256")
	cmd.Flags().StringVar(&o.SHA256, "sha256", "", "the package's checksum")
	cmd.Flags().StringVar(&o.KeyURL, "gpg-key", "", "where the key is that must have signed the package: an https URL")
	cmd.Flags().StringVar(&o.ClientIP, "client-ip", "", "who may log in over SSH: addresses and CIDRs, separated by commas")
	cmd.Flags().StringVar(&o.Profile, "profile", "", "profile: auto, web-only, web+mail, or one of your own")
	a.completeFlags(cmd, map[string]completer{"profile": a.profileNames})
	return cmd
}
