// What every step asks of a forward pass, in C++: the hash of its graph, and the calls that meet no followed tensor.
//
// Written against torch's own headers, whose classes change from release to release: this module serves the release of
// torch that it was built with, and Python stands in for it everywhere else.

#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/autograd/python_function.h>
#include <torch/csrc/autograd/python_variable.h>

#include <string>
#include <typeindex>
#include <unordered_map>
#include <vector>

namespace py = pybind11;
using torch::autograd::Node;

namespace {

class Hash {
 public:
  void add(size_t x) {
    value_ = (value_ ^ (x + 0x9e3779b97f4a7c15 + (value_ << 12) + (value_ >> 4))) * 0xff51afd7ed558ccd;
  }
  void add(const py::handle& object) { add(static_cast<size_t>(py::hash(object))); }
  size_t value() const { return value_; }

 private:
  size_t value_ = 0;
};

using Pointer = decltype(torch::autograd::Edge::function);  // of another kind in every few releases

// What of a node's attribute belongs to the graph. Numbers as they are: the hash of 2^64 - 1, as torch has -1, is 7.
void add_setting(Hash& hash, const py::handle& value, const py::function& setting) {
  PyObject* v = value.ptr();
  if (PyLong_Check(v)) {
    hash.add(static_cast<size_t>(PyLong_AsUnsignedLongLongMask(v)));
  } else if (PyTuple_CheckExact(v)) {
    hash.add(static_cast<size_t>(PyTuple_GET_SIZE(v)));
    for (const auto& item : value) add_setting(hash, item, setting);
  } else if (PyFloat_Check(v) || PyUnicode_Check(v) || v == Py_None) {
    hash.add(value);
  } else {
    hash.add(setting(value));
  }
}

// `fingerprint` of recording/graph.py, or None where Python has to look: for what is refused, or cannot be read here.
// names: of parameters, by id. sites: nodes. shaped(type): names of the attributes of a node that belong to the graph.
// setting(value): what of such an attribute does, for those that are not plain.
py::object fingerprint(const py::handle& losses, const py::dict& names, const py::iterable& sites,
                       const py::function& shaped, const py::function& setting) {
  static auto& attributes = *new std::unordered_map<std::type_index, py::object>;  // of torch's own nodes, never freed
  std::vector<Pointer> nodes{THPVariable_Unpack(losses.ptr()).grad_fn()};
  if (!nodes[0]) return py::none();
  std::unordered_map<const Node*, size_t> numbers{{nodes[0].get(), 0}};
  for (size_t k = 0; k < nodes.size(); ++k) {
    const auto& edges = nodes[k]->next_edges();
    for (const auto& edge : edges)
      if (edge.function && numbers.try_emplace(edge.function.get(), nodes.size()).second)
        nodes.push_back(edge.function);
  }
  const auto number_of = [&](const Node* node) {
    const auto found = numbers.find(node);
    return found == numbers.end() ? ~size_t{0} : found->second;
  };
  Hash hash;
  bool used = false;
  for (const Pointer& node : nodes) {
    const std::string name = node->name();
    if (name.find("CheckpointFunctionBackward") != std::string::npos) return py::none();
    hash.add(std::hash<std::string>{}(name));
    hash.add(node->num_outputs());
    for (const auto& edge : node->next_edges()) hash.add(number_of(edge.function.get())), hash.add(edge.input_nr);
    for (uint32_t k = 0; k < node->num_inputs(); ++k) {
      const auto& output = node->input_metadata(k);
      if (output.is_nested_tensor()) return py::none();
      hash.add(static_cast<size_t>(output.options().dtype().toScalarType()));
      hash.add(output.shape_as_dim_vector().size());
      for (const auto& size : output.shape_as_dim_vector()) {
        if (size.is_symbolic()) return py::none();
        hash.add(size.as_int_unchecked());
      }
    }
    if (const auto* leaf = dynamic_cast<const torch::autograd::AccumulateGrad*>(node.get())) {
      const auto tensor = py::reinterpret_steal<py::object>(THPVariable_Wrap(leaf->variable));
      const auto id = py::reinterpret_steal<py::object>(PyLong_FromVoidPtr(tensor.ptr()));
      const bool followed = names.contains(id);
      hash.add(followed ? py::object(names[id]) : py::none());
      used = used || followed;
    }
    py::object object;
    const auto python = [&] {
      if (!object) object = py::reinterpret_steal<py::object>(torch::autograd::functionToPyObject(node));
      return object;
    };
    auto known = attributes.find(typeid(*node));
    if (known == attributes.end()) {
      const bool many = THPFunction_Check(python().ptr());  // one C++ type for all classes that are written in Python
      known = attributes.emplace(typeid(*node), many ? py::none() : shaped(py::type::of(python()))).first;
    }
    const py::object found = known->second.is_none() ? shaped(py::type::of(python())) : known->second;
    for (const auto& attribute : found) add_setting(hash, python().attr(attribute), setting);
  }
  for (const auto& site : sites) {
    if (THPFunction_Check(site.ptr())) return py::none();
    hash.add(number_of(reinterpret_cast<torch::autograd::THPCppFunction*>(site.ptr())->cdata.get()));
  }
  return used ? py::object(py::int_(hash.value())) : py::none();
}

// Whether a followed tensor is among some arguments of a call, tuples and lists of them included; -1 with an error set.
int meets(PyObject* sources, PyObject* const* arguments, Py_ssize_t count) {
  for (Py_ssize_t k = 0; k < count; ++k) {
    PyObject *argument = arguments[k], *id = PyLong_FromVoidPtr(argument);
    int found = id ? PyDict_Contains(sources, id) : -1;
    Py_XDECREF(id);
    if (!found && (PyTuple_Check(argument) || PyList_Check(argument)))
      found = meets(sources, PySequence_Fast_ITEMS(argument), PySequence_Fast_GET_SIZE(argument));
    if (found) return found;
  }
  return 0;
}

// Interception.__torch_function__ of recording/interception.py: self, function, types, arguments, keyword arguments.
PyObject* torch_function(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (count < 4 || !PyTuple_Check(given[3])) return PyErr_BadArgument(), nullptr;
  PyObject *self = given[0], *function = given[1], *args = given[3];
  PyObject* kwargs = count > 4 && given[4] != Py_None && PyDict_GET_SIZE(given[4]) ? given[4] : nullptr;
  static PyObject *tables = PyUnicode_InternFromString("tables"), *special = PyUnicode_InternFromString("special"),
                  *settle = PyUnicode_InternFromString("settle");
  const auto known = py::reinterpret_steal<py::object>(PyObject_GetAttr(self, tables));
  if (!known) return nullptr;
  PyObject *is_ordinary = PyTuple_GET_ITEM(known.ptr(), 0), *sources = PyTuple_GET_ITEM(known.ptr(), 1);
  const auto answer = py::reinterpret_steal<py::object>(PyObject_CallOneArg(is_ordinary, function));
  if (!answer) return nullptr;
  int met = answer.ptr() != Py_True;
  if (!met) met = meets(sources, PySequence_Fast_ITEMS(args), PyTuple_GET_SIZE(args));
  if (!met && kwargs) {
    const auto values = py::reinterpret_steal<py::object>(PyDict_Values(kwargs));
    met = values ? meets(sources, PySequence_Fast_ITEMS(values.ptr()), PyList_GET_SIZE(values.ptr())) : -1;
  }
  if (met < 0) return nullptr;
  if (met) return PyObject_CallMethodObjArgs(self, special, function, args, kwargs ? kwargs : Py_None, nullptr);
  PyObject* out = PyObject_Call(function, args, kwargs);
  if (!out || !THPVariable_Check(out)) return out;
  PyObject* first = PyTuple_GET_SIZE(args) ? PyTuple_GET_ITEM(args, 0) : nullptr;
  if (first && THPVariable_Check(first)) {  // one tensor that depends on the samples is enough: most calls end here
    const auto id = py::reinterpret_steal<py::object>(PyLong_FromVoidPtr(first));
    int constant = 0;
    for (Py_ssize_t k = 2; id && !constant && k < PyTuple_GET_SIZE(known.ptr()); ++k)
      constant = PyDict_Contains(PyTuple_GET_ITEM(known.ptr(), k), id.ptr());
    if (id && !constant) return out;
  }
  PyObject* done = PyObject_CallMethodObjArgs(self, settle, out, args, kwargs ? kwargs : Py_None, nullptr);
  Py_XDECREF(done);
  if (!done) Py_CLEAR(out);
  return out;
}

// `attributes_in_python` of recording/fixed.py.
py::list attributes(const py::iterable& modules, const py::handle& usual) {
  auto* tensor = reinterpret_cast<PyTypeObject*>(THPVariableClass);
  py::list found;
  for (const auto& module : modules) {
    const auto held = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module.ptr(), nullptr));
    PyObject *name = nullptr, *value = nullptr;
    for (Py_ssize_t at = 0; PyDict_Next(held.ptr(), &at, &name, &value);)
      if ((PyDict_Check(value) || PyType_IsSubtype(Py_TYPE(value), tensor)) && !PySet_Contains(usual.ptr(), name))
        found.append(py::handle(value));
  }
  return found;
}

PyMethodDef torch_function_method{"__torch_function__",
                                  reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(torch_function)), METH_FASTCALL,
                                  nullptr};

}  // namespace

PYBIND11_MODULE(NAME, m) {
  m.def("fingerprint", &fingerprint);
  m.def("attributes", &attributes);
  const auto function = py::reinterpret_steal<py::object>(PyCFunction_New(&torch_function_method, nullptr));
  m.attr("torch_function") = py::reinterpret_steal<py::object>(PyInstanceMethod_New(function.ptr()));
}
