variables {
  rpm    = "https://example.com/basicfw-agent.rpm"
  sha256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
}

run "everything" {
  variables {
    client_ip = ["203.0.113.9", "2001:db8:1::/64"]
    profile   = "web+mail"
  }
  assert {
    condition     = startswith(output.user_data, "#cloud-config\n")
    error_message = "not a cloud-config"
  }
  assert {
    condition     = strcontains(output.user_data, "rpm='https://example.com/basicfw-agent.rpm'\n") && strcontains(output.user_data, "set -- --profile web+mail --client-ip 203.0.113.9,2001:db8:1::/64\n")
    error_message = "the values are missing"
  }
  assert {
    condition     = length(yamldecode(output.user_data).bootcmd) == 2 && length(yamldecode(output.user_data).runcmd) == 1
    error_message = "the commands are missing"
  }
}

run "no_checksum" {
  command = plan
  variables {
    sha256 = ""
  }
  expect_failures = [terraform_data.checked]
}

run "a_quote" {
  command = plan
  variables {
    rpm = "https://example.com/'; reboot; '"
  }
  expect_failures = [terraform_data.checked]
}

run "a_name" {
  command = plan
  variables {
    client_ip = ["office.example.com"]
  }
  expect_failures = [var.client_ip]
}
