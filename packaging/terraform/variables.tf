variable "rpm" {
  description = "https URL of the package."
  type        = string
  default     = ""
}

variable "sha256" {
  description = "SHA-256 checksum of the package, as sha256sum prints it."
  type        = string
  default     = ""

  validation {
    condition     = var.sha256 == "" || can(regex("^[0-9a-f]{64}$", var.sha256))
    error_message = "sha256 has 64 hexadecimal digits, in lower case."
  }
}

variable "client_ip" {
  description = "Addresses and networks that may log in over SSH. Without one, bootstrap detects the client, or leaves SSH open to any address, limited."
  type        = list(string)
  default     = []

  validation {
    condition     = alltrue([for a in var.client_ip : can(regex("^[0-9a-fA-F.:/]+$", a))])
    error_message = "client_ip is a list of addresses and networks in CIDR notation."
  }
}

variable "profile" {
  description = "The profile: auto, web-only, web+mail, or one of your own."
  type        = string
  default     = "auto"

  validation {
    condition     = can(regex("^[a-z0-9+._-]+$", var.profile))
    error_message = "profile is the name of a profile."
  }
}
