// Joins the parts of an error message.
#pragma once

#include <sstream>
#include <string>

namespace ingot {

// The parts one after another, numbers in decimal.
template <typename... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

}  // namespace ingot
