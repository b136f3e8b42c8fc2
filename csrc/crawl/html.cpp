// What a page would cost the HTML parser: its time grows with the square of some kinds of nesting.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>

namespace ingot {
namespace {

// Elements that the parser opens anew in each later block where they were left open.
constexpr std::string_view kFormatting[] = {"b", "big", "code", "em", "font", "i", "s", "small", "strike", "strong", "tt", "u"};
// Elements whose whole content is looked at to find the main content.
constexpr std::string_view kBlocks[] = {"article", "div"};

bool is_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }
char lower(char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c; }
bool is_letter(char c) { return lower(c) >= 'a' && lower(c) <= 'z'; }

template <std::size_t n>
bool among(std::string_view name, const std::string_view (&names)[n]) {
  for (std::string_view one : names) {
    if (name == one) return true;
  }
  return false;
}

class Scan {
 public:
  explicit Scan(std::string_view html) : html_(html) {}

  // Elements that the parser makes, at most; and steps that it and the search for the main content take.
  std::pair<std::uint64_t, std::uint64_t> run() {
    while ((at_ = html_.find('<', at_)) < html_.size()) {
      const char next = peek(1);
      const bool is_end = next == '/' && is_letter(peek(2));
      if (is_end || is_letter(next)) {
        at_ += 1 + is_end;
        tag(is_end);
      } else if (html_.compare(at_, 4, "<!--") == 0) {
        at_ = html_.find("-->", at_ + 2);
      } else {
        ++at_;
      }
    }
    return {nodes_, visits_};
  }

 private:
  char peek(std::size_t ahead) const { return at_ + ahead < html_.size() ? html_[at_ + ahead] : '\0'; }

  void tag(bool is_end) {
    std::string name;
    for (; at_ < html_.size() && !is_space(html_[at_]) && html_[at_] != '/' && html_[at_] != '>'; ++at_) {
      if (name.size() < 8) name += lower(html_[at_]);  // longer than any name that matters
    }
    const std::uint64_t attributes = skip_attributes();
    const bool is_formatting = among(name, kFormatting), is_block = among(name, kBlocks);
    if (is_end) {
      formatting_ -= is_formatting && formatting_ > 0;
      blocks_ -= is_block && blocks_ > 0;
      return;
    }
    nodes_ += 1 + formatting_;
    visits_ += 1 + blocks_ + attributes * attributes / 16;  // each is compared with those before, which is quick
    formatting_ += is_formatting;
    blocks_ += is_block;
    if (name == "script" || name == "style") skip_raw("</" + name);
  }

  // Go past the tag's end; how many attributes it has.
  std::uint64_t skip_attributes() {
    std::uint64_t count = 0;
    while (true) {
      while (at_ < html_.size() && (is_space(html_[at_]) || html_[at_] == '/')) ++at_;
      if (at_ >= html_.size() || html_[at_++] == '>') return count;
      ++count;
      at_ = html_.find_first_of(" \t\n\f\r/>=", at_);
      while (at_ < html_.size() && is_space(html_[at_])) ++at_;
      if (at_ >= html_.size() || html_[at_] != '=') continue;
      do ++at_; while (at_ < html_.size() && is_space(html_[at_]));
      const char quote = peek(0);
      const bool quoted = quote == '"' || quote == '\'';
      at_ = quoted ? html_.find(quote, at_ + 1) : html_.find_first_of(" \t\n\f\r>", at_);
      at_ += quoted && at_ < html_.size();
    }
  }

  // Go past what is no markup, to the end tag; to the end where there is none.
  void skip_raw(const std::string& end) {
    while ((at_ = html_.find("</", at_)) < html_.size()) {
      std::size_t i = 2;
      while (i < end.size() && lower(peek(i)) == end[i]) ++i;
      if (i == end.size()) return;
      at_ += 2;
    }
  }

  std::string_view html_;
  std::size_t at_ = 0;
  std::uint64_t nodes_ = 0, visits_ = 0, formatting_ = 0, blocks_ = 0;
};

}  // namespace

void bind_html(pybind11::module_& module) {
  module.def("html_cost", [](std::string_view html) { return Scan(html).run(); }, pybind11::arg("html"));
}

}  // namespace ingot
