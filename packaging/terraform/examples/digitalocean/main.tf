# A droplet that is closed from its first boot.
terraform {
  required_providers {
    digitalocean = {
      source = "digitalocean/digitalocean"
    }
  }
}

module "basicfw" {
  source    = "../.."
  rpm       = "https://example.com/basicfw-agent-0.2.0-1.x86_64.rpm"             # CHANGE
  sha256    = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855" # CHANGE
  client_ip = ["203.0.113.9"]                                                    # CHANGE
  profile   = "web-only"
}

resource "digitalocean_droplet" "web" {
  name      = "web-1"
  image     = "rockylinux-9-x64"
  size      = "s-1vcpu-1gb"
  region    = "fra1"
  user_data = module.basicfw.user_data

  lifecycle {
    # user-data only counts at the first boot. A changed address or package in it would
    # replace the droplet, with everything on it. Change a running server with
    # "basicfw-agent ssh allow", its settings, or Ansible.
    ignore_changes = [user_data]
  }
}
