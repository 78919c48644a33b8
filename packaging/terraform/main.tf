# The user-data of a server. user-data.tftpl is what "basicfw-agent user-data" prints, with
# these values in place of its options; a test compares them.
locals {
  flags = join(" ", concat(
    var.profile == "auto" ? [] : ["--profile", var.profile],
    length(var.client_ip) == 0 ? [] : ["--client-ip", join(",", var.client_ip)],
  ))
  user_data = templatefile("${path.module}/user-data.tftpl", {
    rpm    = var.rpm
    sha256 = var.sha256
    flags  = local.flags
  })
}

# The URL ends up between single quotes in a shell script.
resource "terraform_data" "checked" {
  lifecycle {
    precondition {
      condition     = can(regex("^https://[A-Za-z0-9._~:/?@!$&()*+,;=%-]+$", var.rpm))
      error_message = "rpm is not an https URL."
    }
    precondition {
      condition     = var.sha256 != ""
      error_message = "sha256 is missing: a person who replaces the package would be root on the server."
    }
  }
}

output "user_data" {
  description = "For user_data of the server. Add ignore_changes = [user_data] there: see README.md."
  value       = local.user_data
  depends_on  = [terraform_data.checked]
}
